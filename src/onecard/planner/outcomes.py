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

# A run beyond these, by what its plan said uncorrected, tells of something else (another program on the card, a machine
# that slept), which is not to be hidden in a factor. A laptop's lowest power limit alone can make a step three times as
# long.
_MEMORY_FACTORS = (0.85, 1.2)
_TIME_FACTORS = (0.25, 5.0)
# Rows of one card that are looked at, the newest ones.
_NUM_ROWS = 50
# No figure of a run is as large; integers of a damaged line may be larger than a float.
_LARGEST = 1e18


@dataclass(frozen=True)
class Outcome:
    """One finished run beside what was predicted for it, uncorrected. `seconds` are `StepTime.seconds`."""

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

    @property
    def memory_ratio(self) -> float:
        """What the run reserved, as a factor of what was predicted."""
        return self.measured_peak_bytes / self.predicted_peak_bytes

    @property
    def teaches_time(self) -> bool:
        """Whether its steps took what calibration may explain."""
        return _is_within(self.measured_step_s / self.predicted_step_s, _TIME_FACTORS)

    @property
    def teaches_memory(self) -> bool:
        """Whether its memory is near enough to be explained by a factor."""
        return _is_within(self.memory_ratio, _MEMORY_FACTORS)

    def describe(self) -> str:
        """Prediction and outcome as a sentence."""
        memory = self.memory_ratio - 1
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
    """The card's efficiencies, moved by what its own runs took; runs far from what was predicted are left out."""
    known = [outcome for outcome in outcomes_of(card.key) if outcome.teaches_time]
    runs = [Measured(outcome.measured_step_s, outcome.seconds) for outcome in known]
    return calibrate(default_efficiencies(card), runs)


def memory_factor(card: Card) -> float:
    """What the card's own runs reserved, as a factor of what was predicted: the median, 1 before the first.

    Runs far from what was predicted are left out.
    """
    ratios = [outcome.memory_ratio for outcome in outcomes_of(card.key) if outcome.teaches_memory]
    return statistics.median(ratios) if ratios else 1.0


def count_left_out(card: Card) -> tuple[int, int]:
    """Counts the card's runs that are too far from what was predicted to teach anything, by memory and by time."""
    outcomes = outcomes_of(card.key)
    return sum(not one.teaches_memory for one in outcomes), sum(not one.teaches_time for one in outcomes)


def _is_within(ratio: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= ratio <= bounds[1]


def _read(line: str) -> Outcome | None:
    try:
        outcome = Outcome(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    figures = (outcome.predicted_peak_bytes, outcome.measured_peak_bytes)
    times = (outcome.predicted_step_s, outcome.measured_step_s)
    if not (isinstance(outcome.card, str) and all(_is_number(figure) and figure > 0 for figure in (*figures, *times))):
        return None
    if not (isinstance(outcome.seconds, dict) and isinstance(outcome.settings, dict)):
        return None
    return outcome if all(_is_number(value) and value >= 0 for value in outcome.seconds.values()) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
