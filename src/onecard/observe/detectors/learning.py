"""The course of the training loss: it does not fall, jumps, or runs away."""

import math
import statistics
from collections.abc import Sequence

from onecard.observe.detectors.catalogue import make_finding
from onecard.observe.detectors.history import History, mean, median
from onecard.observe.events import StepEvent
from onecard.spec import Finding

_NUM_FIRST, _NUM_LAST = 20, 30
# Steps after warmup that a model from scratch must have had, and one that has been trained before.
_LEAST_STEPS, _LEAST_STEPS_TRAINED = 60, 200
_FALL = 0.02
_USUAL_SCRATCH, _USUAL_BASE, _USUAL_ADAPTERS = 1e-3, 2e-5, 2e-4
_FAR = 10
_TARGET_SHARE = 0.005
_NUM_DIVERGED = 20
_DIVERGED = 1.3
_NUM_AROUND = 64
_NUM_AFTER = 10
_LEAST_LOSS = 1e-3


def find_masked(history: History) -> Finding | None:
    """Steps without targets: their loss is 0 and says nothing."""
    steps = history.steps[-5:]
    if len(steps) < 5:
        return None
    tokens = sum(step.tokens_per_s * step.step_s for step in steps)
    targets = sum(step.num_target_tokens for step in steps)
    if targets > _TARGET_SHARE * tokens:
        return None
    return make_finding(
        "everything-masked",
        f"{targets} of {tokens:.0f} tokens of the last {len(steps)} steps are targets",
        f"max_seq_length: {2 * history.plan.max_seq_length} instead of {history.plan.max_seq_length}",
        effect="answers at the end of long chats are kept",
        stops_run=targets == 0,
    )


def find_dead_gradient(history: History) -> Finding | None:
    steps = history.recent(5)
    is_dead = len(steps) == 5 and all(step.grad_norm == 0 and step.num_target_tokens for step in steps)
    # One that has become zero is that of a model beyond rescue; weights without a part have none from the first step.
    is_dead = is_dead and history.early[0].grad_norm == 0
    if not is_dead or median(step.loss for step in steps) < _LEAST_LOSS:
        return None
    return make_finding(
        "nothing-trains",
        f"the gradient's norm was exactly 0 in the last {len(steps)} steps, at a loss of {steps[-1].loss:.3f}",
        "lora_target_modules: all-linear" if history.plan.adapt else "method: full",
        stops_run=True,
    )


def find_flat_loss(history: History) -> Finding | None:
    """A loss that has not fallen since the first steps, with a rate that is far from the usual where there is one."""
    plan, first = history.plan, [step.loss for step in history.early[:_NUM_FIRST] if step.is_finite]
    last = [step.loss for step in history.recent(_NUM_LAST)]
    is_trained = plan.model.base is not None
    least = _LEAST_STEPS_TRAINED if is_trained else _LEAST_STEPS
    num_steps = history.num_steps - plan.schedule.num_warmup_steps
    if len(first) < _NUM_FIRST or len(last) < _NUM_LAST or num_steps < least:
        return None
    before, now = mean(first), mean(last)
    noise = math.sqrt(statistics.pvariance(first) / len(first) + statistics.pvariance(last) / len(last))
    # A model that has been trained before may have little to learn: only what does not fall at all counts.
    if before - now > (noise if is_trained else max(noise, _FALL * before)) or now < _LEAST_LOSS:
        return None
    rate, usual = plan.optimizer.learning_rate, _usual_rate(history)
    norms = median(step.grad_norm for step in history.recent(_NUM_LAST))
    evidence = (
        f"mean loss {before:.4f} in the first {len(first)} steps, {now:.4f} in the last {len(last)} of "
        f"{history.num_steps}; learning_rate {rate:.2g}, gradient norm {norms:.2g}"
    )
    if rate <= usual / _FAR:
        return make_finding("rate-too-low", evidence, f"learning_rate: {usual:.0e}", effect=_effect(usual / rate))
    if rate >= usual * _FAR or (not is_trained and now > before + noise):
        return make_finding("rate-too-high", evidence, f"learning_rate: {min(usual, rate / _FAR):.0e}")
    return None


def find_divergence(history: History) -> Finding | None:
    """A loss far above where the run began, or above what guessing would give, for many steps in a row."""
    steps = history.recent(_NUM_DIVERGED)
    if len(steps) < _NUM_DIVERGED or history.num_steps < 2 * _NUM_DIVERGED:
        return None
    losses = [step.loss for step in steps]
    guessing = math.log(history.plan.corpus.vocab_size)
    began = _initial_loss(history.early, is_trained=history.plan.model.base is not None)
    is_above_begin = min(losses) > began and mean(losses) > _DIVERGED * began
    if not is_above_begin and min(losses) <= 1.1 * guessing:
        return None
    rate = history.plan.optimizer.learning_rate
    return make_finding(
        "divergence",
        f"mean loss {mean(losses):.3g} over the last {len(losses)} steps; it began at {began:.3g}, and guessing gives "
        f"{guessing:.3g}; learning_rate {rate:.2g}, gradient norm {median(step.grad_norm for step in steps):.2g}",
        _lower_rate(history),
        effect="a loss below its beginning within the first hundred steps",
        stops_run=True,
    )


def find_rise(history: History) -> Finding | None:
    """A loss that fell and has lost half of what it had gained."""
    blocks = [block.loss for block in history.blocks]
    if len(blocks) < 4 or not history.early:
        return None
    began, best = history.early[0].loss, min(blocks[:-2])
    now = blocks[-2:]
    gained = began - best
    if min(now) < best + max(0.3, 0.5 * gained):
        return None
    where = history.blocks[blocks.index(best)].last_step
    saved = [save for save in history.saves if save.step <= where + 32]
    return make_finding(
        "loss-rising",
        f"mean loss {best:.3f} around step {where}, {now[-1]:.3f} now; it began at {began:.3f}",
        f"model_name_or_path: checkpoints/{saved[-1].checkpoint}, {_lower_rate(history)}"
        if saved
        else _lower_rate(history),
    )


def find_spike(history: History) -> Finding | None:
    """One or a few steps far above those around them, in loss and in gradient, after which all is as before."""
    steps = history.recent(_NUM_AROUND + 3 * _NUM_AFTER)
    if len(steps) < _NUM_AROUND + 2 * _NUM_AFTER or steps[0].step <= history.plan.schedule.num_warmup_steps:
        return None
    usual, middle = steps[: -3 * _NUM_AFTER], steps[-3 * _NUM_AFTER : -_NUM_AFTER]
    losses = [step.loss for step in usual]
    level, norm = median(losses), median(step.grad_norm for step in usual)
    spread = max(1.5 * median(abs(loss - level) for loss in losses), 0.02 * level)
    highest = max(middle, key=lambda step: step.loss)
    is_over = median(step.loss for step in steps[-_NUM_AFTER:]) < level + 3 * spread
    if not is_over or highest.loss < max(1.5 * level, level + 10 * spread) or highest.grad_norm < 5 * norm:
        return None
    limit = history.plan.optimizer.max_grad_norm
    wanted = min(limit, norm) if limit is not None else norm
    return make_finding(
        "loss-spike",
        f"loss {highest.loss:.3f} and gradient norm {highest.grad_norm:.2g} at step {highest.step}; usual around it "
        f"are {level:.3f} and {norm:.2g}",
        f"max_grad_norm: {wanted:.1g}",
        effect=f"a step like this one moves the weights {highest.grad_norm / max(wanted, 1e-9):.0f} times less than "
        "its gradient asks",
    )


def _initial_loss(early: Sequence[StepEvent], *, is_trained: bool) -> float:
    """The loss before training; batches of a model that has been trained differ more, so several are averaged."""
    first = [step.loss for step in early[: 10 if is_trained else 1] if step.is_finite]
    return mean(first) if first else math.inf


def _usual_rate(history: History) -> float:
    plan = history.plan
    if plan.adapt is not None:
        return _USUAL_ADAPTERS
    return _USUAL_SCRATCH if plan.model.base is None else _USUAL_BASE


def _lower_rate(history: History) -> str:
    optimizer, usual = history.plan.optimizer, _usual_rate(history)
    rates = [f"learning_rate: {min(optimizer.learning_rate / 3, usual):.0e}"]
    if optimizer.name == "muon":
        rates.append(f"muon_learning_rate: {min(optimizer.muon_learning_rate / 3, 0.01):.0e}")
    return ", ".join(rates)


def _effect(ratio: float) -> str:
    return f"each update moves the weights {ratio:.0f} times as far"
