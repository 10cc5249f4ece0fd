"""The figures of findings in words: one template a phrase, in English and Chinese.

Records hold English. Who shows them in Chinese finds each phrase again by its template, so that records need no second
language and old ones are translated, too.
"""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("phrases.toml")
# Phrases stand side by side, and within one of them settings do.
_SEPARATORS = (("; ", "；"), (", ", "，"))
# Values that may hold separators; in all others one would be the begin of the next phrase.
_LISTS = ("names", "told", "error", "problem", "asked")


class Phrasebook:
    """Translates sentences that were made of templates: `{"{num} steps": "{num} 步"}`.

    What no template gives stays as it is, and so do the values between.
    """

    def __init__(self, templates: Mapping[str, str]) -> None:
        # The one that says most comes first: another may be a part of it.
        ordered = sorted(templates.items(), key=lambda pair: -len(re.sub(r"\{.*?\}", "", pair[0])))
        self._patterns = [(_as_pattern(english), other) for english, other in ordered]

    def translate(self, text: str) -> str:
        """Translates a whole text, or each part of it that a separator tells from the next."""
        return self._translate(text, _SEPARATORS)

    def _translate(self, text: str, separators: tuple[tuple[str, str], ...]) -> str:
        for pattern, other in self._patterns:
            if found := pattern.fullmatch(text):
                values = {name: self._translate(value, ()) for name, value in found.groupdict().items()}
                return other.format(**values)
        if not separators:
            return text
        (separator, mark), *finer = separators
        parts = text.split(separator)
        told = [self._translate(part, tuple(finer)) for part in parts]
        # Settings to be typed keep their English commas.
        return (separator if told == parts else mark).join(told)


def phrase(name: str, /, **values: Any) -> str:
    """Says a phrase in English.

    Raises `KeyError` for a phrase that the catalogue lacks.
    """
    return _read()[name]["en"].format(**values)


@cache
def phrasebook() -> Phrasebook:
    """The phrases of all findings in Chinese."""
    return Phrasebook({row["en"]: row["zh"] for row in _read().values()})


def _as_pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    values = {part: ".+?" if part in _LISTS else "(?:(?!; |, ).)+?" for part in parts[1::2]}
    texts = [f"(?P<{part}>{values[part]})" if number % 2 else re.escape(part) for number, part in enumerate(parts)]
    return re.compile("".join(texts))


@cache
def _read() -> dict[str, dict[str, str]]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))
