"""The outcome of one test of this machine."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "warning", "bad", "not applicable"]


@dataclass(frozen=True)
class Check:
    """What was tested, how it went, what was found, and what to do about it (empty where nothing is to be done).

    `warning` is what makes training slower, smaller or riskier; `bad` is what keeps something from working.
    """

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""
