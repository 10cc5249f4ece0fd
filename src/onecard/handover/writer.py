"""One text of a model, piece by piece, however it is asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.data import ChatTemplate, Turn
from onecard.errors import DataError, InputError
from onecard.handover.text_stream import StopStrings, Stripped, TextStream
from onecard.model.generate import Sampling, check_ids, check_prompts, encode_prompts
from onecard.model.streaming import PrefixCache, context_of, stream_ids

OnText = Callable[[str], None]
Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Prompt:
    """Ids to go on with, and those that end what follows; `is_chat` tells that it is an answer."""

    ids: Sequence[int]
    stop_ids: Sequence[int]
    is_chat: bool


@dataclass(frozen=True)
class Written:
    """What was written, and why it ended: by the model or a stop string (`stop`), its limit, or because it was told."""

    text: str
    num_tokens: int
    reason: Reason


class Writer:
    """A model with its tokenizer, template and the keys and values of what it wrote last; for one thread."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises InputError where the tokenizer's chat template cannot render a question and an answer."""
        self.tokenizer = tokenizer
        self.context = context_of(model)
        self.template = _template_of(tokenizer)
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        self._model = model
        self._prefix = PrefixCache()

    def refuse_endless(self, texts: Sequence[str]) -> None:
        """Refuses at once what the context has no room for however it is cut: to encode megabytes takes a minute.

        Raises:
            InputError: with the least number of tokens that the texts can have.
        """
        num_characters = sum(map(len, texts))
        if (least := num_characters // self._longest_token) >= self.context:
            raise InputError(
                f"{num_characters:,} characters are {least:,} tokens or more, and the model's context has"
                f" {self.context:,} for the text and the answer: shorten it"
            )

    def encode_text(self, text: str) -> Prompt:
        """Encodes a text to go on with.

        Raises:
            InputError: characters that the tokenizer does not know.
        """
        if text:
            check_prompts(self.tokenizer, [text])
        (ids,), stop_ids = encode_prompts(self._model, self.tokenizer, [text])
        check_ids(self._model, [ids])
        return Prompt(ids, stop_ids, is_chat=False)

    def encode_chat(self, turns: Sequence[Turn]) -> Prompt:
        """Encodes a conversation to answer.

        Raises:
            InputError: the model has no chat template, or its template or tokenizer cannot write these turns.
        """
        if self.template is None:
            raise InputError("this model has no chat template: it was trained to go on with text, not to answer")
        check_prompts(self.tokenizer, [turn.content for turn in turns if turn.content])
        ids = self.template.prompt(turns)
        check_ids(self._model, [ids])
        return Prompt(ids, self.template.stop_ids, is_chat=True)

    def write(
        self,
        prompt: Prompt,
        sampling: Sampling,
        on_text: OnText,
        *,
        stops: Sequence[str] = (),
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Written:
        """Continues ids and calls `on_text` with every piece of text as soon as it is certain.

        Text ends before the first of `stops`. An answer has no white space at its ends.

        Raises:
            InputError: as `stream_ids` does.
        """
        stream, gate, pieces = TextStream(self.tokenizer, prompt.ids), StopStrings(stops), list[str]()
        shape = Stripped().add if prompt.is_chat else str

        def tell(text: str) -> None:
            if shaped := shape(text):
                pieces.append(shaped)
                on_text(shaped)

        def take(token: int) -> bool:
            if token not in prompt.stop_ids:
                tell(gate.add(stream.add(token)))
            return not gate.is_found and not is_cancelled()

        ids = stream_ids(self._model, prompt.ids, prompt.stop_ids, sampling, take, self._prefix)
        tell(gate.add(stream.finish()))
        has_ended = gate.is_found or ids[-1] in prompt.stop_ids
        tell(gate.finish())
        reason: Reason = "stop" if has_ended else "cancelled" if len(ids) < sampling.max_new_tokens else "length"
        return Written("".join(pieces), len(ids), reason)

    def limit(self, sampling: Sampling, prompt: Prompt) -> Sampling:
        """Lowers the number of new tokens to what the context has left."""
        room = max(1, self.context - len(prompt.ids))
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def _template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    # A tokenizer without a template would be given one that the model has never seen.
    if not tokenizer.chat_template:
        return None
    try:
        return ChatTemplate.of(tokenizer)
    except DataError as error:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} cannot be used: {error} Mend its chat_template.jinja and "
            "tokenizer_config.json, or remove the template and let the model go on with text"
        ) from error
