"""Ids to text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from onecard.model.generate import decode_after

# Decoders write it for bytes that are not, or not yet, a character.
_INCOMPLETE = "\ufffd"
# Of a character of four bytes so many may have come; some decoders write the mark for each of them.
_MOST_INCOMPLETE = 3
# Tokens that are decoded together at most: bytes that never make a whole would be decoded anew with each that comes.
_MOST_PENDING = 64


class TextStream:
    """Decodes ids one by one; what it gives, joined, is the text of all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # Few ids are enough to tell whether a word begins: a space before it may be part of its token.
        self._before, self._pending = list(before[-8:]), list[int]()
        self._given = ""

    def add(self, token: int) -> str:
        """Gives the text that the token completes, often empty: a Chinese character may take three."""
        self._pending.append(token)
        text = decode_after(self._tokenizer, self._before, self._pending)
        num_incomplete = len(text) - len(text.rstrip(_INCOMPLETE))
        if len(self._pending) >= _MOST_PENDING or (text and not num_incomplete):
            return self._pass(text)
        certain = text[: len(text) - min(num_incomplete, _MOST_INCOMPLETE)]
        if not certain.startswith(self._given):
            return ""
        piece, self._given = certain[len(self._given) :], certain
        return piece

    def finish(self) -> str:
        """Gives what was held back, broken characters as they are."""
        if not self._pending:
            return ""
        return self._pass(decode_after(self._tokenizer, self._before, self._pending))

    def _pass(self, text: str) -> str:
        """Gives what has not been given of the pending tokens' text, and goes on behind them."""
        piece = text[len(self._given) :]
        self._before, self._pending, self._given = self._pending[-8:], [], ""
        return piece


class StopStrings:
    """Lets text pass up to the first of some strings; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_found = False

    def add(self, text: str) -> str:
        """Gives the text that is certainly before any stop string."""
        if self.is_found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_found = True
            return self._pass(min(places))
        return self._pass(len(self._held) - max((self._begun(stop) for stop in self._stops), default=0))

    def finish(self) -> str:
        """Gives what was held back, if no stop string has come."""
        return "" if self.is_found else self._pass(len(self._held))

    def _begun(self, stop: str) -> int:
        """Counts the characters at the end that begin a stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)

    def _pass(self, size: int) -> str:
        passed, self._held = self._held[:size], self._held[size:]
        return passed


class Stripped:
    """Gives text without white space at its ends, as answers are trained and kept."""

    def __init__(self) -> None:
        self._held, self._has_begun = "", False

    def add(self, text: str) -> str:
        """Gives the text up to its last letter; the white space after it may be the end."""
        text = self._held + (text if self._has_begun else text.lstrip())
        kept = text.rstrip()
        self._held = text[len(kept) :]
        self._has_begun = self._has_begun or bool(kept)
        return kept
