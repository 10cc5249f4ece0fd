"""What became of a run, in numbers; and what of several can be set side by side."""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onecard.observe.events import EvaluatedEvent
from onecard.report.record import RunRecord

# Steps in which libraries load and compilers work say nothing of the speed; of a short run a tenth.
_WARM_UP = 10


@dataclass(frozen=True)
class HeldoutPoint:
    """A held-out loss in nats per target token with its standard error, and where in the run it was measured."""

    step: int
    tokens_seen: int | None
    elapsed_s: float
    loss: float
    standard_error: float
    bits_per_byte: float | None

    @property
    def bits_error(self) -> float:
        """The standard error in bits per byte."""
        if self.bits_per_byte is None or not self.loss > 0:
            return math.nan
        return self.standard_error * self.bits_per_byte / self.loss


@dataclass(frozen=True)
class RunSummary:
    """One run: `state` is how it ended; `tokens_per_s` the median over steps; `peak_bytes` what the GPU's allocator
    reserved, None on a CPU; `num_damaged` the lines of its record that could not be read."""

    name: str
    folder: str
    state: str
    steps: int
    num_steps: int
    tokens_seen: int
    elapsed_s: float
    tokens_per_s: float | None
    peak_bytes: int | None
    train_loss: float | None
    last: HeldoutPoint | None
    best: HeldoutPoint | None
    num_evaluations: int
    num_refused: int
    num_damaged: int
    findings: tuple[str, ...]


def summarize_run(run: RunRecord, name: str) -> RunSummary:
    """Reduces a run to its numbers."""
    steps, points = run.steps, heldout_points(run)
    finite = [point for point in points if math.isfinite(point.loss)]
    warm = steps[min(_WARM_UP, len(steps) // 10) :]
    losses = [step.loss for step in steps[-_WARM_UP:] if math.isfinite(step.loss)]
    return RunSummary(
        name=name,
        folder=str(run.root),
        state=_state(run),
        steps=steps[-1].step if steps else 0,
        num_steps=run.plan.schedule.num_steps,
        tokens_seen=steps[-1].tokens_seen if steps else 0,
        elapsed_s=run.events[-1].elapsed_s if run.events else 0.0,
        tokens_per_s=statistics.median(step.tokens_per_s for step in warm) if warm else None,
        peak_bytes=max((step.memory_bytes for step in steps if step.memory_bytes is not None), default=None),
        train_loss=statistics.fmean(losses) if losses else None,
        last=points[-1] if points else None,
        best=min(finite, key=lambda point: point.loss, default=None),
        num_evaluations=len(points),
        num_refused=sum(not step.is_finite for step in steps),
        num_damaged=run.num_damaged,
        findings=tuple(dict.fromkeys(finding.symptom for finding in run.findings)),
    )


def heldout_points(run: RunRecord) -> list[HeldoutPoint]:
    """The held-out losses of a run, in their order."""
    tokens = {step.step: step.tokens_seen for step in run.steps}
    return [_point(event, tokens.get(event.step)) for event in run.evaluated]


def name_runs(runs: Sequence[RunRecord]) -> list[str]:
    """Names runs by the last parts of their paths, by as many as it takes to tell each from the others."""
    parts = [run.root.parts for run in runs]
    for depth in range(1, max(map(len, parts))):
        names = [str(Path(*path[-depth:])) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [os.fspath(run.root) for run in runs]


def find_measure(runs: Sequence[RunRecord]) -> tuple[str | None, str]:
    """Says which held-out figure of all runs can be compared, `loss` or `bits_per_byte`, and what stands against it.

    A fingerprint tells text, split and tokenizer together, so that texts which only tokenizers read otherwise are
    known by their size.
    """
    runs = [run for run in runs if run.evaluated]
    plans = [run.plan for run in runs]
    if len(plans) < 2:
        return "loss", ""
    facts = [plan.corpus for plan in plans]
    parts = {(p.eval_batches, p.eval_batch_size, p.max_seq_length) if p.eval_batches else None for p in plans}
    is_same_text = len({(fact.heldout_bytes, plan.task) for fact, plan in zip(facts, plans, strict=True)}) == 1
    is_same_tokens = is_same_text and len({(f.vocab_size, f.num_heldout_tokens) for f in facts}) == 1
    if not is_same_text:
        return None, "the runs held out different text, so their losses cannot be compared"
    if len(parts) > 1 or (not is_same_tokens and parts != {None}):
        return None, (
            "the runs measured their losses on different parts of the held-out text (eval_batches), so they cannot be "
            "compared"
        )
    if not is_same_tokens:
        if any(run.evaluated[-1].bits_per_byte is None for run in runs):
            return None, "tokenizers differ and bits per byte are missing, so losses cannot be compared"
        return "bits_per_byte", "tokenizers differ, so bits per byte are compared, not losses"
    if len({plan.max_seq_length for plan in plans}) > 1:
        return "loss", "max_seq_length differs, so each token was predicted from another length of text"
    return "loss", ""


def _point(event: EvaluatedEvent, tokens_seen: int | None) -> HeldoutPoint:
    return HeldoutPoint(event.step, tokens_seen, event.elapsed_s, event.loss, event.standard_error, event.bits_per_byte)


def _state(run: RunRecord) -> str:
    if run.finished is not None:
        return run.finished.reason
    return "in training" if run.events else "not begun"
