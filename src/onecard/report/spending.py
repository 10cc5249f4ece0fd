"""Where the time of a run went, and its memory beside what was planned."""

from collections.abc import Mapping
from dataclasses import dataclass

from onecard.observe.events import EvaluatedEvent, SampledEvent, SavedEvent, ScoredEvent
from onecard.report.chart import Bar, draw_bar
from onecard.report.figures import typical_step_s
from onecard.report.record import RunRecord, read_object
from onecard.report.words import Say
from onecard.units import format_bytes, format_seconds

_NUM_COLOURS = 8
_LEAST_SHARE = 0.01
_MOST_LIMIT = 4


@dataclass(frozen=True)
class Spending:
    """A whole in parts: the picture, its rows (colour, name, amount, share), and sentences below."""

    svg: str
    rows: tuple[tuple[int, str, str, str], ...]
    notes: tuple[str, ...]


def time_of(run: RunRecord, say: Say) -> Spending | None:
    """Adds up seconds by what they were spent on; None for a run without steps."""
    steps = run.steps
    typical = typical_step_s(run)
    if not steps or typical is None:
        return None
    # The first step compiles, loads kernels and grows the memory: what it took beyond a usual one is no training.
    start_s = max(0.0, steps[0].step_s - typical) if len(steps) > 2 else 0.0
    waited_s = sum(min(step.wait_s, step.step_s) for step in steps)
    computed_s = sum(step.step_s for step in steps) - waited_s - start_s
    busy = run.plan.max_power_share or 1.0
    parts = {
        say("training"): busy * computed_s,
        say("waiting for data"): waited_s,
        say("first step: compiling, warming up"): start_s,
        say("evaluating"): sum(event.seconds for event in run.of(EvaluatedEvent)),
        say("samples"): sum(event.seconds for event in run.of(SampledEvent)),
        say("saving"): sum(event.paused_s for event in run.of(SavedEvent)),
    }
    if busy < 1:
        # Steps are told with their rests, all else without.
        beside_s = sum(parts[say(name)] for name in ("evaluating", "samples", "saving"))
        parts[say("resting (max_power_share)")] = (1 - busy) * computed_s + (1 / busy - 1) * beside_s
    parts[say("other")] = max(0.0, run.events[-1].elapsed_s - sum(parts.values()))
    # Scores count in no elapsed time.
    parts[say("scoring checkpoints")] = sum(event.seconds for event in run.of(ScoredEvent))
    total = sum(parts.values()) or 1.0
    rows, bars = [], []
    for colour, (name, seconds) in enumerate(parts.items()):
        if seconds / total < 0.0005:
            continue
        amount, share = _duration(seconds), f"{seconds / total:.1%}"
        rows.append((colour, name, amount, share))
        bars.append(Bar(name, seconds / total, f"{amount}, {share}", colour))
    return Spending(draw_bar(bars), tuple(rows), tuple(_time_notes(run, typical, say)))


def _time_notes(run: RunRecord, typical: float, say: Say) -> list[str]:
    notes = []
    time = run.plan.forecast.time if run.plan.forecast is not None else None
    if time is not None:
        notes.append(
            say(
                "A step took {took} (median); planned were {planned} ({low} to {high}), limited by {limit}.",
                took=_duration(typical),
                planned=_duration(time.step_s),
                low=_duration(time.step_low_s),
                high=_duration(time.step_high_s),
                limit=say.term(time.limited_by),
            )
        )
    if (share := run.plan.max_power_share) is not None and share < 1:
        notes.append(
            say("It rested so as to compute at most {share} of the time (max_power_share).", share=f"{share:.0%}")
        )
    shares = [step.share_of_peak for step in run.steps if step.share_of_peak is not None]
    if shares:
        peak = sum(shares) / len(shares)
        notes.append(say("On average {share} of what a large matrix product reaches here.", share=f"{peak:.0%}"))
    return notes


def memory_of(run: RunRecord, say: Say) -> Spending | None:
    """Sets the memory that was planned, by what holds it, beside what was measured; None where nothing was planned."""
    if run.plan.forecast is None:
        return None
    memory, measured = run.plan.forecast.memory, measured_bytes(run)
    # Of a GPU the parts hold what CUDA takes beside the allocator, which is what is measured and limited.
    beside = memory.breakdown.get("CUDA context", 0)
    total = sum(memory.breakdown.values()) or 1
    limit = memory.limit_bytes + beside
    # A plan for 2 GiB of 48 would be a thin line: then the bar ends with the plan, and the limit is only said.
    whole = max(total, (measured or 0) + beside, limit if limit < _MOST_LIMIT * total else 0)
    rows, bars = [], []
    for colour, (name, size) in enumerate(_large_parts(memory.breakdown)):
        rows.append((colour, say.term(name), format_bytes(size), f"{size / total:.1%}"))
        bars.append(Bar(say.term(name), size / whole, format_bytes(size), colour))
    band = f"{format_bytes(memory.peak_low_bytes)} – {format_bytes(memory.peak_high_bytes)}"
    notes = [say("Planned: {peak} at the fullest moment ({band}).", peak=format_bytes(memory.peak_bytes), band=band)]
    if measured is not None:
        off = f"{measured / memory.peak_bytes - 1:+.1%}"
        notes.append(say("Measured: {peak}, {off} beside the plan.", peak=format_bytes(measured), off=off))
    else:
        notes.append(say("Not measured: the run is not finished, or was too short."))
    notes.append(say("Free for training: {limit}.", limit=format_bytes(memory.limit_bytes)))
    mark = (measured + beside) / whole if measured is not None else None
    return Spending(draw_bar(bars, mark), tuple(rows), tuple(notes))


def _large_parts(breakdown: Mapping[str, int]) -> list[tuple[str, int]]:
    """The largest parts and the sum of the others, as many as there are colours."""
    parts = sorted(((name, size) for name, size in breakdown.items() if size > 0), key=lambda part: -part[1])
    least = _LEAST_SHARE * sum(size for _, size in parts)
    shown = [part for part in parts[: _NUM_COLOURS - 1] if part[1] >= least]
    rest = sum(size for _, size in parts[len(shown) :])
    return [*shown, ("other", rest)] if rest else shown


def measured_bytes(run: RunRecord) -> int | None:
    """The most memory a run took: of a GPU what the allocator reserved, of a CPU what the process held."""
    reserved = max((step.memory_bytes for step in run.steps if step.memory_bytes is not None), default=None)
    kept = read_object(run.root / "outcome.json").get("measured_peak_bytes")
    return reserved if reserved is not None else kept if isinstance(kept, int) else None


def _duration(seconds: float) -> str:
    if seconds >= 60:
        return format_seconds(seconds)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
