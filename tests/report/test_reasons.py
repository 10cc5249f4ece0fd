"""Reasons of plans in Chinese."""

import string

import pytest

from onecard.report.reasons import _REASONS, tell_reason
from onecard.report.words import Say


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("english", _REASONS)
def test_a_reason_is_found_again_with_its_values(english: str) -> None:
    assert fields(english) == fields(_REASONS[english])
    values = {field: f"x{number}" for number, field in enumerate(sorted(fields(english)))}
    assert tell_reason(english.format(**values), Say("zh")) == _REASONS[english].format(**values)
    assert tell_reason(english.format(**values), Say("en")) == english.format(**values)


def test_reasons_within_reasons_are_translated_too() -> None:
    told = tell_reason(
        "at most 8.19K tokens at once; smaller ones were slower here, in seconds of passes a step: 1: 2", Say("zh")
    )
    assert told == "一次最多 8.19K token；更小的在本机更慢，每步各次前后向的秒数：1: 2"
    named = "RTX 3060 is there, but PyTorch cannot use it: the driver may be too old for this PyTorch"
    assert tell_reason(named, Say("zh")) == "有 RTX 3060，但是PyTorch 不能使用它：驱动可能太旧"
    assert tell_reason("as nobody says it", Say("zh")) == "as nobody says it"
