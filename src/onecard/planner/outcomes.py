"""What runs on this machine's cards took beside what was predicted; the next plan for a card is corrected by it.

Rows lie in $ONECARD_HOME/outcomes.jsonl, one JSON object each, without paths or text, so that they can be shared.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onecard.hardware import Card
from onecard.hardware.local_cards import local_cards_file
from onecard.planner.calibrate import Measured, calibrate
from onecard.planner.efficiency import Efficiencies, default_efficiencies
from onecard.units import format_bytes

# A correction beyond this says that something else is wrong; it is not to be hidden in a factor.
_MEMORY_FACTORS = (0.85, 1.2)
# Rows of one card that are looked at, the newest ones.
_NUM_ROWS = 50


@dataclass(frozen=True)
class Outcome:
    """One finished run. `seconds` are `StepTime.seconds` by the uncorrected efficiencies."""

    card: str
    platform: str
    torch: str
    driver: str | None
    date: str
    settings: dict[str, Any]
    predicted_peak_bytes: int
    measured_peak_bytes: int
    predicted_step_s: float
    measured_step_s: float
    seconds: dict[str, float]

    def describe(self) -> str:
        """Prediction and outcome as a sentence."""
        memory = self.measured_peak_bytes / self.predicted_peak_bytes - 1
        time = self.measured_step_s / self.predicted_step_s - 1
        return (
            f"memory {format_bytes(self.measured_peak_bytes)}, predicted {format_bytes(self.predicted_peak_bytes)} "
            f"({memory:+.1%}); step {self.measured_step_s:.3g} s, predicted {self.predicted_step_s:.3g} ({time:+.0%})"
        )


def outcomes_file() -> Path:
    """Gives the file of outcomes, beside the local cards."""
    return local_cards_file().with_name("outcomes.jsonl")


def remember(outcome: Outcome) -> None:
    """Appends an outcome; a folder that cannot be written to is no reason for a finished run to fail."""
    try:
        outcomes_file().parent.mkdir(parents=True, exist_ok=True)
        with outcomes_file().open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
    except OSError:
        return


def outcomes_of(card: str | None = None) -> list[Outcome]:
    """Reads what was remembered of a card, or of all, oldest first; lines that are none are skipped."""
    try:
        lines = outcomes_file().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = [outcome for line in lines if (outcome := _read(line)) and card in (None, outcome.card)]
    return found[-_NUM_ROWS:]


def corrected_efficiencies(card: Card) -> Efficiencies:
    """The card's efficiencies, moved by what its own runs took."""
    runs = [Measured(outcome.measured_step_s, outcome.seconds) for outcome in outcomes_of(card.key)]
    return calibrate(default_efficiencies(card), runs)


def memory_factor(card: Card) -> float:
    """What the card's own runs reserved, as a factor of what was predicted: the median, 1 before the first."""
    ratios = [outcome.measured_peak_bytes / outcome.predicted_peak_bytes for outcome in outcomes_of(card.key)]
    if not ratios:
        return 1.0
    low, high = _MEMORY_FACTORS
    return min(high, max(low, statistics.median(ratios)))


def _read(line: str) -> Outcome | None:
    try:
        outcome = Outcome(**json.loads(line))
        is_whole = min(outcome.predicted_peak_bytes, outcome.measured_peak_bytes, outcome.predicted_step_s) > 0
        return outcome if is_whole and isinstance(outcome.seconds, dict) else None
    except (ValueError, TypeError, RecursionError):
        return None
