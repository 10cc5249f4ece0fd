"""What a run took beside what its plan said."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onecard.units import format_seconds

if TYPE_CHECKING:
    from onecard.observe import FinishedEvent
    from onecard.planner.outcomes import Outcome
    from onecard.spec import Plan


def outcome_rows(
    plan: "Plan", finished: "FinishedEvent", outcome: "Outcome | None", evaluations_s: Sequence[float]
) -> list[tuple[str, str]]:
    """Sets memory, step, evaluations and the whole run beside the plan: label and text per row.

    Without `outcome`, which needs some steps to tell, the first two are left out; the whole run is that of one that
    has done all of its steps.
    """
    told = [] if outcome is None else [outcome.describe()]
    time = plan.forecast.time if plan.forecast else None
    if time is not None and time.evaluation_s and evaluations_s:
        taken = sum(evaluations_s) / len(evaluations_s)
        told.append(
            f"evaluation {taken:.2g} s, predicted {time.evaluation_s:.2g} ({taken / time.evaluation_s - 1:+.0%})"
        )
    if time is not None and finished.reason == "completed" and finished.step >= finished.num_steps:
        share = finished.elapsed_s / time.total_s - 1
        told.append(
            f"whole run {format_seconds(finished.elapsed_s)}, predicted {format_seconds(time.total_s)} ({share:+.0%})"
        )
    return [("as planned?", text) if number == 0 else ("", text) for number, text in enumerate(told)]
