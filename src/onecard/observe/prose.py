"""Events as lines for people: ASCII only, so that any console can print them."""

from collections.abc import Sequence

from onecard.observe.events import (
    ChosenEvent,
    EvaluatedEvent,
    FindingEvent,
    FinishedEvent,
    RanksEvent,
    RecoveredEvent,
    SavedEvent,
    ScoredEvent,
)
from onecard.observe.pace import Pace
from onecard.units import format_bytes, format_count, format_seconds


def describe_speed(pace: Pace, *, with_share: bool = True) -> str:
    speed = f"{format_count(pace.tokens_per_s)} tokens/s"
    share = pace.share_of_peak if with_share else None
    return speed if share is None else f"{speed} ({share:.0%} of peak)"


def describe_time_left(pace: Pace) -> str:
    left = pace.seconds_left
    return "" if left is None else f"{format_seconds(left)} left"


def describe_refused(pace: Pace) -> str:
    """Says how many of the recent updates were refused; empty where none was."""
    return f"{pace.num_refused} not finite, skipped" if pace.num_refused else ""


def describe_evaluated(event: EvaluatedEvent) -> str:
    parts = [f"held-out loss {event.loss:.4f} +/- {event.standard_error:.4f}"]
    if event.bits_per_byte is not None:
        parts.append(f"{event.bits_per_byte:.4f} bits per byte")
    if event.is_best:
        parts.append("best so far")
    return "  ".join(parts)


def describe_scored(event: ScoredEvent) -> str:
    what = f"{event.task}, all {event.n} items:" if event.is_whole else f"{event.task}, {event.n} items:"
    score = f"{event.metric} {event.scores[event.metric]:.4f} +/- {event.standard_error:.4f}"
    best = "  best so far" if event.is_best else ""
    return f"{event.checkpoint}  {what} {score}  ({format_seconds(event.seconds)}){best}"


def describe_chosen(event: ChosenEvent) -> str:
    text = (
        f"best by {event.task}: {event.checkpoint} of {event.num_scored} ({event.metric} {event.value:.4f} +/- "
        f"{event.standard_error:.4f}, {event.n} items)"
    )
    return f"{text}; not to be told from it: {', '.join(event.undecided)}" if event.undecided else text


def describe_saved(event: SavedEvent) -> str:
    return f"saved {event.checkpoint} ({event.reason}, {format_bytes(event.num_bytes)}, {event.seconds:.1f} s)"


def describe_finding(event: FindingEvent) -> list[str]:
    """Writes a finding as its symptom and, below it, what shows it, why, and what to change."""
    return [
        event.symptom,
        f"  evidence: {event.evidence}",
        f"  likely cause: {event.likely_cause}",
        f"  remedy: {event.remedy}",
    ]


def list_findings(findings: Sequence[FindingEvent]) -> list[str]:
    """Names what was found in a run, a line each, and where more is said about it."""
    lines = [f"  step {event.step}  {event.symptom}" for event in findings]
    ids = dict.fromkeys(event.id for event in findings if event.id)
    more = [f"  more: docs/troubleshooting.md, {', '.join(ids)}"] if ids else []
    return ["found:", *lines, *more]


def describe_recovered(event: RecoveredEvent) -> list[str]:
    """Writes what went wrong and how the run goes on; below it what was met, and who held the memory."""
    head = f"{event.problem} ({event.during})"
    if event.returned_from is not None:
        head += f" at step {event.returned_from}"
    lines = [f"{head}: {event.remedy}", f"  evidence: {event.evidence}"]
    if event.held_bytes:
        held = ", ".join(f"{name} {format_bytes(count)}" for name, count in event.held_bytes.items())
        lines.append(f"  memory: {held}")
    return lines


def describe_ranks(looks: Sequence[RanksEvent]) -> str:
    """Says how several processes kept up with one another: the slowest, and how long the others waited."""
    if not looks:
        return ""
    num_steps = sum(look.num_steps for look in looks)
    waited = [
        sum(look.num_steps * share for look, share in zip(looks, shares, strict=True)) / num_steps
        for shares in zip(*(look.waiting_shares for look in looks), strict=True)
    ]
    slowest = min(range(len(waited)), key=waited.__getitem__)
    others = [share for rank, share in enumerate(waited) if rank != slowest]
    told = f"{min(others):.0%} to {max(others):.0%}" if len(others) > 1 else f"{others[0]:.0%}"
    return f"{len(waited)} ranks: rank {slowest} was the slowest, the others waited {told} of the time for it"


def describe_finished(event: FinishedEvent) -> list[str]:
    steps = f"{event.step} steps" if event.step >= event.num_steps else f"step {event.step} of {event.num_steps}"
    lines = [
        f"{event.reason}: {steps}, {format_count(event.tokens_seen)} tokens "
        f"in {format_seconds(event.elapsed_s)}, {format_count(event.tokens_per_s)} tokens/s"
    ]
    if event.best_loss is not None:
        lines.append(f"best held-out loss {event.best_loss:.4f} at step {event.best_step}")
    return lines
