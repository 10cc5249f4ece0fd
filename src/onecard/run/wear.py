"""What frequent checkpoints do to a solid-state drive."""

from onecard.observe.detectors import make_finding, phrase
from onecard.spec import Finding
from onecard.units import GIB, format_bytes

# What makers of consumer drives of a terabyte vouch for (data sheet of the Samsung 990 PRO: 600 TBW).
_RATED_BYTES = 600e12
_ABSURD_BYTES_PER_HOUR = 200 * GIB
# Less says nothing about an hour.
_LEAST_S = 600.0


def find_wear(num_bytes: int, seconds: float) -> Finding | None:
    """Finds that a run writes more than a consumer drive is made for; None for less, and in the first ten minutes."""
    if seconds < _LEAST_S:
        return None
    per_hour = num_bytes * 3600 / seconds
    if per_hour < _ABSURD_BYTES_PER_HOUR:
        return None
    days = _RATED_BYTES / per_hour / 24
    return make_finding(
        "drive-wear",
        phrase("an-hour", size=format_bytes(per_hour)),
        "",
        effect=phrase("worn-after", size=f"{_RATED_BYTES / 1e12:.0f} TB", days=f"{days:.0f}"),
    )
