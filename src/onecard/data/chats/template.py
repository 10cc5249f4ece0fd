"""Conversations to tokens through the chat template, with a mask of what the model is to write.

The ids are those of `tokenizer.apply_chat_template`. Only answers count: from the end of the generation prompt to the
end of the stop token. What a template writes by itself in between, such as an empty <think> block, counts too, since
the model will have to write it. Where a template ends answers with no token, the end-of-text token is appended to the
last one and counts.

A content that spells a special token is refused (`special token in text`): the ids would hold the real token, so that
an answer ends, or another turn begins, inside a text. Role marks of plain letters (`User:`, `[INST]`) cannot be told
from text and stay.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onecard.data.chats.answers import Span, find_by_prefixes, match_shape, search_answers
from onecard.data.chats.conversation import BadRow, Conversation, Example, PlainText, Rendered, Turn
from onecard.data.chats.shape import Shape, find_shape
from onecard.data.chats.shown import QUESTION, find_shown
from onecard.data.chats.span_tokens import end_token, first_token
from onecard.data.chats.template_choice import add_tokens, choose, mend_specials
from onecard.data.chats.typed_text import PromptEncoder, mark_typed
from onecard.data.tokenizer import drops_unknown
from onecard.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

# A set with tools of its own in every row would keep a shape for each.
_MAX_SHAPES = 4096


class ChatTemplate:
    """A tokenizer's chat template and what was found out about it; made by `ChatTemplate.of`.

    `name` says for people which template it is. `new_tokens` were added to the vocabulary for it; `mended_tokens` are
    special tokens that the tokenizer did not find in running text. `appends_end` tells that answers end with no token
    of the template. `stop_ids` end an answer; `control_tokens` are all special tokens that the template writes, with
    their ids; `shows` tells what beside questions and answers gets into the text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        self.name = name
        self.new_tokens: tuple[str, ...] = ()
        self.mended_tokens: tuple[str, ...] = ()
        # Without its post-processor, which may cut white space off the offsets and adds nothing here.
        self._encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._encoder.post_processor = None
        self._drops_unknown = drops_unknown(self._encoder)
        added = tokenizer.added_tokens_decoder.values()
        specials = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._specials = _any_of(specials)
        self._prompts = PromptEncoder(self._encoder, specials)
        self._special_ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(specials)))
        self._shapes: dict[tuple[tuple[str, ...], str], Shape | BadRow] = {}
        # Phi-like vocabularies have tokens to stop at that are added but not special.
        self._stops = self._specials
        written = self._try_out(name)
        closing = written[-1]
        if self._specials.search(closing) is None:
            self._stops = _any_of({token.content for token in added if not token.content.isspace()} | specials)
        found = self._stops.search(closing)
        self.appends_end = found is None
        if self.appends_end:
            self.name += f", {self._end_token()} appended to the last answer"
        self._shapes.clear()
        ends = (found.group() if found else None, tokenizer.eos_token)
        self.stop_ids = tuple(dict.fromkeys(tokenizer.convert_tokens_to_ids(end) for end in ends if end is not None))
        names = [*self._stops.findall("".join(written)), *([self._end_token()] if self.appends_end else ())]
        self.control_tokens = tuple((name, int(tokenizer.convert_tokens_to_ids(name))) for name in dict.fromkeys(names))
        self.shows = find_shown(lambda chat: self._texts([chat], False)[0])

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", source: str = "auto") -> "ChatTemplate":
        """Gives the tokenizer its chat template, to be saved with it, and studies it.

        `source`: `auto` (the tokenizer's own, else `default`), `default`, `chatml`, `eos`, or the path of a .jinja
        file, a tokenizer_config.json or a folder with one. Tokens a template needs are added to the tokenizer. Raises
        DataError where there is no such template, or it cannot render a question and an answer.
        """
        if not tokenizer.is_fast:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path!r}: it is no fast tokenizer (there is no tokenizer.json), so which"
                " tokens are the answer's cannot be told. Convert it to tokenizer.json (AutoTokenizer with"
                " use_fast=True and its conversion packages), or use the tokenizer of a model that has one."
            )
        text, name, needed = choose(tokenizer, source)
        tokenizer.chat_template = text
        new, mended = add_tokens(tokenizer, needed), mend_specials(tokenizer)
        template = cls(tokenizer, name)
        template.new_tokens, template.mended_tokens = new, mended
        return template

    def render(self, examples: Sequence[Example]) -> list[Rendered | BadRow]:
        """Renders and encodes a batch, in order; about 10,000 short rows a second on one core.

        BadRow kinds: `template refuses` (with the template's own words), `unclear template`, `special token in text`,
        `private characters`, `unknown characters`, `no stop token`, `call not shown`.
        """
        texts = self._rendered_texts(examples)
        found: list[list[Span] | BadRow] = [
            text if isinstance(text, BadRow) else self._spans(text, example)
            for text, example in zip(texts, examples, strict=True)
        ]
        encodings = iter(
            self._encoder.encode_batch(
                [str(text) for text, spans in zip(texts, found, strict=True) if not isinstance(spans, BadRow)],
                add_special_tokens=False,
            )
        )
        return [
            spans if isinstance(spans, BadRow) else self._rendered(str(text), spans, next(encodings), example)
            for text, spans, example in zip(texts, found, examples, strict=True)
        ]

    def count_tokens(self, examples: Sequence[Example]) -> list[int | BadRow]:
        """Counts the tokens that `render` gives, without looking for answers, which takes long in a long chat."""
        texts = self._rendered_texts(examples)
        encodings = iter(
            self._encoder.encode_batch([text for text in texts if isinstance(text, str)], add_special_tokens=False)
        )
        return [
            text if isinstance(text, BadRow) else len(next(encodings)) + self._ends_open(example)
            for text, example in zip(texts, examples, strict=True)
        ]

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Gives the ids of a conversation that the model is to go on with, generation prompt and all.

        A special token in a content is encoded as the letters it is written with.
        """
        marked, typed = mark_typed(turns, self._specials)
        (text,) = self._texts([Conversation(tuple(marked))], True)
        if isinstance(text, BadRow):
            raise DataError(f"chat template ({self.name}): it refuses this conversation: {text.reason}.")
        return self._prompts.encode(text, typed)

    def text_bytes(self, ids: np.ndarray) -> int:
        """Counts the UTF-8 bytes that tokens stand for, special tokens left out (a cut character may count as 3)."""
        return len(self.tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8"))

    def _try_out(self, name: str) -> tuple[str, ...]:
        """Renders a question and an answer; gives the text around them."""
        shape = self._shape(Conversation(QUESTION))
        if isinstance(shape, BadRow):
            raise DataError(
                f"chat template ({name}): it cannot be used to learn answers, for a question and its answer fail"
                f" ({shape.kind}: {shape.reason}). Choose another with chat_template, for example 'default'."
            )
        return shape.fixed

    def _end_token(self) -> str:
        if self.tokenizer.eos_token is None:
            raise DataError(
                f"chat template ({self.name}): it ends answers with no special token, and the tokenizer has no"
                " end-of-text token to append, so no answer would ever end. Set the tokenizer's eos_token."
            )
        return str(self.tokenizer.eos_token)

    def _rendered_texts(self, examples: Sequence[Example]) -> list[str | BadRow]:
        texts = [self._find_special(example) for example in examples]
        chats = [index for index, text in enumerate(texts) if text is None]
        rendered = self._texts([examples[index] for index in chats], False)  # type: ignore[misc]
        for index, text in zip(chats, rendered, strict=True):
            texts[index] = text
        return texts  # type: ignore[return-value]

    def _find_special(self, example: Example) -> str | BadRow | None:
        """Gives running text as it is, None for a conversation yet to be rendered, BadRow for either with a special."""
        if isinstance(example, Conversation) and not self.shows.calls:
            turns = enumerate(example.turns, 1)
            silent = next((number for number, turn in turns if "tool_calls" in turn.extras and not turn.content), None)
            if silent is not None:
                reason = f"turn {silent} is a call of a tool alone, which the template leaves out"
                return BadRow("call not shown", reason)
        for content in _texts_of(example):
            found = self._specials.search(content)
            if found is not None:
                reason = f"a text has the special token {found.group()} in it; take it out or write it differently"
                return BadRow("special token in text", reason)
        return example.text if isinstance(example, PlainText) else None

    def _texts(self, chats: Sequence[Conversation], is_prompt: bool) -> list[str | BadRow]:
        """Renders together where no chat has tools; a batch that fails is halved to find the ones to blame."""
        if not chats:
            return []
        if len(chats) > 1 and any(chat.tools for chat in chats):
            return [text for chat in chats for text in self._texts([chat], is_prompt)]
        messages = [[turn.message for turn in chat.turns] for chat in chats]
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    messages, tools=list(chats[0].tools) or None, tokenize=False, add_generation_prompt=is_prompt
                )
            )
        except Exception as error:  # a template is a program: it raises what it likes
            if len(chats) > 1:
                half = len(chats) // 2
                return self._texts(chats[:half], is_prompt) + self._texts(chats[half:], is_prompt)
            words = str(error).strip().rstrip(".") or type(error).__name__
            return [BadRow("template refuses", f"the chat template says: {words}")]

    def _spans(self, text: str, example: Example) -> list[Span] | BadRow:
        if isinstance(example, PlainText):
            return [Span(0, len(text), "")]
        if any(turn.extras for turn in example.turns):
            return find_by_prefixes(text, example.turns, self._stops, self._renderer(example))
        shape = self._shape(example)
        if isinstance(shape, BadRow):
            return shape
        spans = match_shape(text, example.turns, shape)
        return search_answers(text, example.turns, shape, self._renderer(example)) if spans is None else spans

    def _shape(self, chat: Conversation) -> Shape | BadRow:
        roles = tuple(turn.role for turn in chat.turns)
        key = roles, json.dumps(chat.tools) if chat.tools else ""
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            shape = self._shapes[key] = find_shape(chat, self._renderer(chat), self._stops)
        return shape

    def _renderer(self, chat: Conversation) -> Any:
        def render(turns: Sequence[Turn], is_prompt: bool) -> str | BadRow:
            return self._texts([Conversation(tuple(turns), chat.tools)], is_prompt)[0]

        return render

    def _rendered(self, text: str, spans: list[Span], encoding: "Encoding", example: Example) -> Rendered | BadRow:
        ids = encoding.ids
        if self._drops_unknown and len({position for pair in encoding.offsets for position in range(*pair)}) < len(
            text
        ):
            return BadRow("unknown characters", "it has characters that the tokenizer does not know")
        is_target, target_bytes = np.zeros(len(ids) + 1, bool), 0
        for span in spans:
            first, last = first_token(encoding, span, self._special_ids), end_token(encoding, span, len(text))
            if last is None or (span.stop and ids[last - 1] != self.tokenizer.convert_tokens_to_ids(span.stop)):
                return BadRow("no stop token", f"{span.stop} after an answer becomes no token of its own")
            is_target[first:last] = True
            target_bytes += len(text[span.start : span.end - len(span.stop)].encode("utf-8"))
        is_partial = isinstance(example, Conversation) and self.shows.leaves_out(example)
        if self._ends_open(example):
            is_target[-1] = True
            ids = [*ids, self.tokenizer.eos_token_id]
        return Rendered(np.array(ids, np.int32), is_target[: len(ids)], target_bytes, is_partial=is_partial)

    def _ends_open(self, example: Example) -> bool:
        if isinstance(example, PlainText):
            return self.tokenizer.eos_token_id is not None
        return self.appends_end and example.turns[-1].role == "assistant" and example.turns[-1].counts


def _texts_of(example: Example) -> Iterator[str]:
    """Every text of an example that the template may put in."""
    if isinstance(example, PlainText):
        yield example.text
        return
    if example.tools:
        yield json.dumps(example.tools, ensure_ascii=False)
    for turn in example.turns:
        yield turn.content
        for value in turn.extras.values():
            yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _any_of(words: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")
