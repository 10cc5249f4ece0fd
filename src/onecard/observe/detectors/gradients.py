"""The gradient's norm and fp16's loss scale."""

from onecard.observe.detectors.catalogue import make_finding
from onecard.observe.detectors.history import History, median
from onecard.observe.detectors.phrases import phrase
from onecard.spec import Finding

_NUM_STEPS = 100
_VANISHED = 1e-6
_LEARNED_LOSS = 0.1
_CLIPPED_SHARE, _CLIPPED_TO = 0.99, 10
# Each refused update halves the scale; a healthy run refuses its first few and then about one in two thousand.
_REFUSED = 10


def find_vanishing(history: History) -> Finding | None:
    steps = history.recent(_NUM_STEPS // 2)
    if len(steps) < _NUM_STEPS // 2:
        return None
    norm, loss = median(step.grad_norm for step in steps), median(step.loss for step in steps)
    # An exact zero has a cause of its own.
    if not 0 < norm < _VANISHED or loss < _LEARNED_LOSS:
        return None
    at_first = median(step.grad_norm for step in history.early[:10])
    return make_finding(
        "gradient-vanishing",
        f"{phrase('vanished', norm=f'{norm:.1g}', num=len(steps), first=f'{at_first:.2g}')}; "
        f"{phrase('loss', loss=f'{loss:.3f}')}",
        f"learning_rate: {history.plan.optimizer.learning_rate / 10:.0e}",
    )


def find_clipping(history: History) -> Finding | None:
    limit, steps = history.plan.optimizer.max_grad_norm, history.settled(_NUM_STEPS)
    if limit is None or not steps:
        return None
    norm = median(step.grad_norm for step in steps)
    share = sum(step.grad_norm > limit for step in steps) / len(steps)
    if share < _CLIPPED_SHARE or norm < _CLIPPED_TO * limit:
        return None
    return make_finding(
        "clipping-always",
        phrase("clipped", share=f"{share:.0%}", num=len(steps), norm=f"{norm:.3g}", limit=f"{limit:g}"),
        f"max_grad_norm: {2 * norm:.2g}",
        effect=phrase("clipped-then"),
    )


def find_collapsing_scale(history: History) -> Finding | None:
    steps = history.steps[-_NUM_STEPS:]
    refused = [step.step for step in steps if not step.is_finite]
    # The scale begins far too high on purpose, so that the first refusals are the search for it.
    if history.plan.precision != "fp16" or len(refused) < _REFUSED or refused[-1] < _NUM_STEPS // 2:
        return None
    return make_finding(
        "loss-scale-collapsing",
        phrase("refused", num=len(refused), all=len(steps), step=refused[-1]),
        "precision: bf16",
        effect=phrase("no-overflow"),
    )
