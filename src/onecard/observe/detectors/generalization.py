"""Training text learned by heart."""

from onecard.observe.detectors.catalogue import make_finding
from onecard.observe.detectors.history import Evaluation, History, mean
from onecard.observe.detectors.phrases import phrase
from onecard.spec import Finding

_NUM_ERRORS = 3
_LEAST_RISE = 0.01
_EPOCHS_PRETRAIN, _EPOCHS_SFT = 4, 8
_EPOCHS_BY_HEART = 20
_GAP = 0.1
_GAIN = 0.005


def find_overfitting(history: History) -> Finding | None:
    """Held-out losses that rise since the best one, beyond their errors, while the training loss goes on falling."""
    points = history.evaluations
    # Who has set a patience has it ended and keeps the best: nothing is left to be said.
    if len(points) < 3 or history.plan.early_stopping_patience is not None:
        return None
    best = min(points, key=lambda point: point.event.loss)
    after = points[points.index(best) + 1 :]
    if len(after) < 2:
        return None
    errors = [(best.event.standard_error**2 + point.event.standard_error**2) ** 0.5 for point in after[-2:]]
    rises = [point.event.loss - best.event.loss for point in after[-2:]]
    is_risen = all(
        rise > max(_NUM_ERRORS * error, _LEAST_RISE * best.event.loss)
        for rise, error in zip(rises, errors, strict=True)
    )
    last = points[-1]
    if not is_risen or last.train_loss >= best.train_loss:
        return None
    name = next((save.checkpoint for save in history.saves if save.step == best.event.step), None)
    epochs = best.tokens_seen / max(1, history.plan.corpus.num_train_tokens)
    where = f"step {best.event.step}" if name is None else name
    late = 1 - best.event.step / last.event.step
    told = (
        phrase("training-then", before=f"{best.train_loss:.4f}", now=f"{last.train_loss:.4f}"),
        phrase("passes-at-best", epochs=f"{history.epochs:.1f}", best=f"{epochs:.1f}"),
        phrase("best-checkpoint", name=where),
    )
    return make_finding(
        "overfitting",
        "; ".join((_held_out(best, last), *told)),
        f"early_stopping_patience: 3, {phrase('or-epochs', epochs=f'{epochs:.2g}')}",
        effect=phrase("ends-near", loss=f"{best.event.loss:.4f}", share=f"{late:.0%}"),
    )


def _held_out(best: Evaluation, last: Evaluation) -> str:
    return phrase(
        "held-out",
        best=f"{best.event.loss:.4f}",
        best_step=best.event.step,
        now=f"{last.event.loss:.4f}",
        error=f"{last.event.standard_error:.4f}",
        step=last.event.step,
    )


def find_repetition(history: History) -> Finding | None:
    """Many passes over the text, of which the last brought the held-out loss next to nothing."""
    least = _EPOCHS_PRETRAIN if history.plan.task == "pretrain" else _EPOCHS_SFT
    # Where it does harm, that is the finding.
    if history.epochs < least or find_overfitting(history) is not None:
        return None
    if not history.evaluations:
        return _find_learned_by_heart(history)
    last, tokens = history.evaluations[-1], history.plan.corpus.num_train_tokens
    before = [point for point in history.evaluations if point.tokens_seen <= last.tokens_seen - tokens]
    if not before or last.tokens_seen < least * tokens:
        return None
    losses = [point.event.loss for point in history.evaluations]
    # Two points beyond the best may still turn out to rise.
    if len(losses) - 1 - losses.index(min(losses)) < 3:
        return None
    gain = min(point.event.loss for point in before) - min(losses)
    gap = last.event.loss - last.train_loss
    if gain > max(_GAIN * last.event.loss, last.event.standard_error) or gap < _GAP * last.event.loss:
        return None
    return make_finding(
        "data-repeated",
        f"{phrase('passes', epochs=f'{history.epochs:.1f}', tokens=f'{tokens:,}')}; "
        f"{phrase('last-pass', gain=f'{gain:.4f}', gap=f'{gap:.3f}')}",
        f"num_train_epochs: {before[-1].tokens_seen / tokens:.2g}",
        effect=phrase("in-less-time"),
    )


def _find_learned_by_heart(history: History) -> Finding | None:
    steps = history.recent(20)
    first = [step.loss for step in history.early[:5] if step.is_finite]
    if history.epochs < _EPOCHS_BY_HEART or len(steps) < 20 or not first:
        return None
    before, now = mean(first), mean([step.loss for step in steps])
    if now > _GAP * before:
        return None
    tokens = history.plan.corpus.num_train_tokens
    return make_finding(
        "data-repeated",
        f"{phrase('passes', epochs=f'{history.epochs:.0f}', tokens=f'{tokens:,}')}; "
        f"{phrase('by-heart', before=f'{before:.3f}', now=f'{now:.3f}')}",
        "eval_fraction: 0.05",
        effect=phrase("tells-passes"),
    )
