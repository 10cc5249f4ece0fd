"""What a text may say next, looked up in the text itself: texts repeat their prompt, and small models themselves.

    … the red fox jumps over … the red fox ?      its last three tokens stood before: what followed then is the draft

A model checks all tokens of a draft in one pass, and those that it would have chosen itself are kept, so that the text
stays the same (prompt lookup decoding: Saxena, 2023; a form of speculative decoding: Leviathan et al., 2023).
"""

import math
from collections.abc import Sequence

# As many tokens must have stood before: after two, a quarter of the guesses are wrong; after three, a tenth (LOG.md).
_NUM_SAME = 3
# More hardly save steps any more (LOG.md).
_LONGEST = 4
# Attention computes as many tokens of every text as the longest draft has: so many of the texts must have one.
_SHARE = 2 / 3
# So many more wrong guesses than right ones, and the text is guessed no longer until guesses would be right again.
_CREDIT = 3
_MOST_CREDIT = 6


class Drafter:
    """Guesses how one text of ids goes on; told each id, it learns how far to trust its guesses."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)
        self._credit = _CREDIT
        # The place after each run of tokens, where it stood last.
        self._places: dict[tuple[int, ...], int] = {}
        for end in range(_NUM_SAME, len(self._ids)):
            self._places[tuple(self._ids[end - _NUM_SAME : end])] = end

    def append(self, new_id: int) -> None:
        """Takes the next id of the text."""
        end = tuple(self._ids[-_NUM_SAME:])
        place = self._places.get(end)
        if place is not None:
            was_right = self._ids[place] == new_id
            self._credit = min(self._credit + 1, _MOST_CREDIT) if was_right else max(self._credit - 1, 0)
        if len(end) == _NUM_SAME:
            self._places[end] = len(self._ids)
        self._ids.append(new_id)

    def draft(self, most: int) -> list[int]:
        """Gives up to `most` ids that may follow; none where the text says nothing new twice, or guesses were wrong."""
        place = self._places.get(tuple(self._ids[-_NUM_SAME:]))
        if place is None:
            return []
        # What is repeated may be shorter than the draft, as `na na na`.
        period = len(self._ids) - place
        return [self._ids[place + offset % period] for offset in range(min(most, _LONGEST, self._credit))]


def cut_to_common(drafts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Cuts the drafts of texts that run together to the length that most of them reach: more would not pay."""
    length = sorted(map(len, drafts), reverse=True)[math.ceil(_SHARE * len(drafts)) - 1]
    return [draft[:length] for draft in drafts]
