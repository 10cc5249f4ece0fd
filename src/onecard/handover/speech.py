"""How texts of a model begin and end: the token before a text, those that end it, the form of a chat."""

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.data import ChatTemplate, Turn
from onecard.errors import DataError
from onecard.model.generate import encode_prompts


@dataclass(frozen=True)
class Speech:
    """Ids that begin and end texts of a model.

    `end_id` ends a text, `turn_end_id` an answer where that is another token. `opens_with_bos`: `bos_id` stands before
    every text, of a model that chats before every conversation.
    """

    end_id: int
    turn_end_id: int | None
    bos_id: int | None
    pad_id: int
    opens_with_bos: bool
    is_chat: bool

    @property
    def stop_ids(self) -> list[int]:
        """What ends what the model writes."""
        return [self.end_id] + ([] if self.turn_end_id is None else [self.turn_end_id])

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Speech":
        """Finds it out as `onecard generate` does.

        Raises:
            InputError: nothing names the end of a text.
        """
        (opening,), stops = encode_prompts(model, tokenizer, ["a"])
        plain = tokenizer.encode("a", add_special_tokens=False)
        first = opening[0] if len(opening) > len(plain) else None
        turn_end, chat_first = _turns(tokenizer)
        bos = first if first is not None else tokenizer.bos_token_id
        is_chat = turn_end is not None
        return cls(
            end_id=stops[0],
            turn_end_id=turn_end if turn_end != stops[0] else None,
            bos_id=bos,
            pad_id=stops[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
            opens_with_bos=(chat_first == bos if is_chat else first is not None) and bos is not None,
            is_chat=is_chat,
        )


def _turns(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The token that ends an answer and the one that begins a conversation; None of both where nobody chats."""
    if not tokenizer.chat_template:
        return None, None
    try:
        template = ChatTemplate.of(tokenizer)
        return template.stop_ids[0], template.prompt([Turn("user", "a")])[0]
    except DataError:  # a template that only its authors can use; the end of a text is known all the same
        return None, None
