"""Training text learned by heart."""

from onecard.observe.detectors.catalogue import make_finding
from onecard.observe.detectors.history import History, mean
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
    return make_finding(
        "overfitting",
        f"held-out loss {best.event.loss:.4f} at step {best.event.step}, {last.event.loss:.4f} +/- "
        f"{last.event.standard_error:.4f} at step {last.event.step}; training loss {best.train_loss:.4f} then, "
        f"{last.train_loss:.4f} now; {history.epochs:.1f} passes over the text, {epochs:.1f} at the best; "
        f"best checkpoint: {where}",
        f"early_stopping_patience: 3, or num_train_epochs: {epochs:.2g}",
        effect=f"ends near {best.event.loss:.4f}, without {late:.0%} of the steps so far",
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
        f"{history.epochs:.1f} passes over {tokens:,} tokens; the last pass lowered the best held-out loss by "
        f"{gain:.4f}, and it lies {gap:.3f} above the training loss",
        f"num_train_epochs: {before[-1].tokens_seen / tokens:.2g}",
        effect="the same held-out loss in less time",
    )


def _find_learned_by_heart(history: History) -> Finding | None:
    steps = history.recent(20)
    first = [step.loss for step in history.early[:5] if step.is_finite]
    if history.epochs < _EPOCHS_BY_HEART or len(steps) < 20 or not first:
        return None
    before, now = mean(first), mean([step.loss for step in steps])
    if now > _GAP * before:
        return None
    return make_finding(
        "data-repeated",
        f"{history.epochs:.0f} passes over {history.plan.corpus.num_train_tokens:,} tokens; the training loss fell "
        f"from {before:.3f} to {now:.3f}, and nothing is held out that would say what it is worth",
        "eval_fraction: 0.05",
        effect="the held-out loss then tells how many passes are of use",
    )
