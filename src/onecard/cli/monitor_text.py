"""A run in training as a few lines."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onecard.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from onecard.observe.events import DeviceEvent
    from onecard.report.live import LiveView

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_LABEL_WIDTH, _MAX_WIDTH = 10, 60
# A step that takes longer than so many usual ones may be the end of a process.
_QUIET_STEPS, _QUIET_S = 10, 60.0
_SHOWN_FINDINGS = 4

Line = tuple[str, str, str]


def frame_lines(view: "LiveView", width: int, encoding: str) -> list[Line]:
    """Writes how a run stands as label, text and style per line, for a terminal of so many columns."""
    room = max(10, min(_MAX_WIDTH, width - _LABEL_WIDTH - 2))
    lines = [("run", f"{view.name}  {_state(view)}", "")]
    if view.problem is not None:
        lines.append(("", describe_problem(view.problem), "bold yellow"))
    if view.step is None or view.pace is None:
        return [*lines, ("", "no step has been made yet", "dim")] if view.problem is None else lines
    levels = _BLOCKS if _can_show(_BLOCKS, encoding) else _ASCII
    share = view.step.step / view.num_steps
    done = round(share * (room - 6))
    lines.append(("step", f"{view.step.step:,} of {view.num_steps:,}", ""))
    lines.append(("", f"{levels[-1] * done}{levels[0] * (room - 6 - done)} {share:4.0%}", "green"))
    lines.append(("loss", f"{view.pace.loss:.4f}", ""))
    lines.append(("", sparkline(view.losses, room, levels), "cyan"))
    if view.last is not None and view.best is not None:
        best = "best" if view.best is view.last else f"best {view.best.loss:.4f} at {view.best.step:,}"
        lines.append(
            ("held-out", f"{view.last.loss:.4f} +/- {view.last.standard_error:.4f} at {view.last.step:,}, {best}", "")
        )
    lines.append(("speed", _speed(view), ""))
    if view.step.memory_bytes is not None:
        lines.append(("memory", f"{format_bytes(view.step.memory_bytes)} reserved by the run", ""))
    if view.reading is not None and (card := card_text(view.reading)):
        lines.append(("card", card, ""))
    if view.recovered is not None:
        lines.append(("trouble", f"{view.recovered.problem} ({view.recovered.during})", "bold yellow"))
        lines.append(("", f"step {view.recovered.step:,}: {view.recovered.remedy}", ""))
    for finding in view.findings[-_SHOWN_FINDINGS:]:
        lines.append(("finding", finding.symptom, "bold red" if finding.stops_run else "bold yellow"))
        lines.append(("", f"step {finding.step:,}: {finding.remedy}", ""))
    if (quiet := _quiet(view)) is not None:
        lines.append(("", quiet, "yellow"))
    return lines


def describe_problem(problem: str) -> str:
    """Writes that a run's record does not answer, and what is done about it."""
    return f"the record cannot be read now ({problem}): looking again"


def plain_line(view: "LiveView") -> str:
    """Writes how a run stands as one line for a log."""
    assert view.step is not None
    assert view.pace is not None
    parts = [f"step {view.step.step}/{view.num_steps}", f"loss {view.pace.loss:.4f}"]
    if view.last is not None:
        parts.append(f"held-out {view.last.loss:.4f}")
    parts.append(_speed(view))
    if view.findings:
        parts.append(f"finding: {view.findings[-1].symptom}")
    return "  ".join([*parts, view.finished] if view.finished else parts)


def sparkline(values: Sequence[float], width: int, levels: str) -> str:
    """Draws a curve in one line; `!` stands where it is not finite. The fall at the start is cut to what matters."""
    size = -(-len(values) // width) or 1
    means = [math.fsum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return "!" * len(means)
    settled = [value for value in means[len(means) // 10 :] if math.isfinite(value)] or finite
    low, high = min(finite), max(settled)
    height = (high - low) or 1.0
    top = len(levels) - 1
    return "".join(
        levels[min(top, round((value - low) / height * top))] if math.isfinite(value) else "!" for value in means
    )


def card_text(reading: "DeviceEvent") -> str:
    """Writes what the card of a run did when it was last read; empty for a CPU, and without what no driver told."""
    parts = []
    if reading.card_bytes is not None and reading.card_total_bytes is not None:
        parts.append(f"{format_bytes(reading.card_bytes)} of {format_bytes(reading.card_total_bytes)}")
    if reading.gpu_share is not None:
        parts.append(f"{reading.gpu_share:.0%} busy")
    if reading.temperature_c is not None:
        parts.append(f"{reading.temperature_c:.0f} C")
    if reading.power_w is not None:
        parts.append(f"{reading.power_w:.0f} W")
    return ", ".join(parts)


def _state(view: "LiveView") -> str:
    return view.finished or "training"


def _speed(view: "LiveView") -> str:
    from onecard.observe.prose import describe_refused, describe_speed, describe_time_left

    assert view.pace is not None
    left = describe_time_left(view.pace) if view.finished is None else ""
    return ", ".join(part for part in (describe_speed(view.pace), left, describe_refused(view.pace)) if part)


def _quiet(view: "LiveView") -> str | None:
    """Says that nothing has come for long: a process that was killed leaves no event behind."""
    if view.finished is not None or view.age_s is None or view.step is None:
        return None
    if view.age_s < max(_QUIET_S, _QUIET_STEPS * view.step.step_s):
        return None
    return f"no news for {format_seconds(view.age_s)}: if no process trains any more, onecard resume goes on"


def _can_show(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
