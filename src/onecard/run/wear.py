"""What frequent checkpoints do to a solid-state drive."""

import math

from onecard.observe.detectors import instead, make_finding, phrase, rarer
from onecard.observe.events import SaveReason
from onecard.spec import Finding, Plan
from onecard.units import GIB, format_bytes

# What makers of consumer drives of a terabyte vouch for (data sheet of the Samsung 990 PRO: 600 TBW).
_RATED_BYTES = 600e12
_ABSURD_BYTES_PER_HOUR = 200 * GIB
# Less says nothing about an hour.
_LEAST_S = 600.0


def find_wear(num_bytes: int, seconds: float, plan: Plan, reason: SaveReason) -> Finding | None:
    """Finds that a run writes more than a consumer drive is made for; None for less, and in the first ten minutes.

    `reason` is what the last checkpoint was written for: its interval is the one to change.
    """
    if seconds < _LEAST_S:
        return None
    per_hour = num_bytes * 3600 / seconds
    if per_hour < _ABSURD_BYTES_PER_HOUR:
        return None
    days, factor = _RATED_BYTES / per_hour / 24, max(2, math.ceil(per_hour / _ABSURD_BYTES_PER_HOUR))
    return make_finding(
        "drive-wear",
        f"{phrase('an-hour', size=format_bytes(per_hour))}; "
        f"{phrase('worn-after', size=f'{_RATED_BYTES / 1e12:.0f} TB', days=f'{days:.0f}')}",
        _rarer_saving(plan, reason, factor),
        effect=phrase("worn-then", days=f"{days * factor:.0f}"),
    )


def _rarer_saving(plan: Plan, reason: SaveReason, factor: int) -> str:
    if reason == "clock" and plan.save_minutes is not None:
        return instead("save_minutes", f"{factor * plan.save_minutes:g}", f"{plan.save_minutes:g}")
    key, now = ("eval_steps", plan.eval_steps) if reason == "best" else ("save_steps", plan.save_steps)
    return rarer(key, factor * now, now, plan.schedule.num_steps)
