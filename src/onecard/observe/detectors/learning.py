"""The course of the training loss: it does not fall, jumps, or runs away."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

from onecard.observe.detectors.catalogue import instead, make_finding
from onecard.observe.detectors.history import BLOCK, History, mean, median
from onecard.observe.detectors.phrases import phrase
from onecard.observe.events import SavedEvent, StepEvent
from onecard.spec import Finding

_NUM_FIRST, _NUM_LAST = 20, 30
# Steps after warmup that a model from scratch must have had, and one that has been trained before.
_LEAST_STEPS, _LEAST_STEPS_TRAINED = 60, 200
_FALL = 0.02
_USUAL_SCRATCH, _USUAL_BASE, _USUAL_ADAPTERS = 1e-3, 2e-5, 2e-4
_FAR = 10
_NUM_DIVERGED = 20
_DIVERGED = 1.3
# A base that knows its text begins near 0, where a third more is nothing.
_LEAST_RISE = 0.3
# Blocks of which the mean is compared: single ones of tiny batches differ by as much as a rise.
_NUM_BLOCKS, _NUM_SPREADS = 4, 4
_USUAL_MUON = 0.01
_NUM_AROUND = 64
_NUM_AFTER = 10
_LEAST_LOSS = 1e-3


def find_masked(history: History) -> Finding | None:
    """Steps of which most samples have no target: their loss says nothing."""
    steps = history.steps[-5:]
    if len(steps) < 5:
        return None
    tokens = sum(step.tokens_per_s * step.step_s for step in steps)
    targets = sum(step.num_target_tokens for step in steps)
    num_samples = len(steps) * history.plan.total_batch_size
    # Of a long question with the answer yes nearly all is masked, too: samples are counted, not tokens.
    if targets >= num_samples:
        return None
    return make_finding(
        "everything-masked",
        phrase("targets", targets=targets, tokens=f"{tokens:.0f}", samples=num_samples, num=len(steps)),
        instead("max_seq_length", 2 * history.plan.max_seq_length, history.plan.max_seq_length),
        effect=phrase("long-chats-kept"),
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
        phrase("norm-zero", num=len(steps), loss=f"{steps[-1].loss:.3f}"),
        _other_weights(history),
        stops_run=True,
    )


def find_flat_loss(history: History) -> Finding | None:
    """A loss that has not fallen since the first steps, with a rate that is far from the usual where there is one."""
    plan, first = history.plan, [step.loss for step in history.early if step.is_finite][:_NUM_FIRST]
    last = [step.loss for step in history.applied(_NUM_LAST)]
    is_trained = plan.model.base is not None
    least = _LEAST_STEPS_TRAINED if is_trained else _LEAST_STEPS
    num_steps = history.num_steps - plan.schedule.num_warmup_steps
    if len(first) < _NUM_FIRST or len(last) < _NUM_LAST or num_steps < least:
        return None
    before, now, spread = mean(first), mean(last), statistics.pvariance(last)
    noise = math.sqrt(statistics.pvariance(first) / len(first) + spread / len(last))
    began = ""
    if not is_trained and first[0] < before:
        # A rate far too high throws fresh weights off at once: coming back from there is no fall.
        before, noise = first[0], math.sqrt(spread + spread / len(last))
        began = f"; {phrase('began', began=f'{before:.4f}')}"
    # A model that has been trained before may have little to learn: only what does not fall at all counts.
    if before - now > (noise if is_trained else max(noise, _FALL * before)) or now < _LEAST_LOSS:
        return None
    norms = median(step.grad_norm for step in history.applied(_NUM_LAST))
    rates = _rates(history)
    flat = phrase(
        "flat",
        before=f"{mean(first):.4f}",
        num=len(first),
        now=f"{now:.4f}",
        last=len(last),
        all=history.num_steps,
    )
    told = [*(f"{key} {rate:.2g}" for key, rate, _ in rates), phrase("gradient-norm", norm=f"{norms:.2g}")]
    evidence = f"{flat}{began}; {', '.join(told)}"
    # Muon moves the matrices and Adam the rest: only where both are slow nothing moves.
    if all(rate <= usual / _FAR for _, rate, usual in rates):
        return make_finding("rate-too-low", evidence, _name_rates((key, usual) for key, _, usual in rates))
    is_risen, is_far = now > before + noise, any(rate >= usual * _FAR for _, rate, usual in rates)
    # A base that knows its text stands still at a high rate, too: there only a rise tells.
    if (is_risen and is_far) if is_trained else (is_risen or is_far):
        lower = [(key, min(usual, rate / _FAR)) for key, rate, usual in rates if is_risen or rate >= usual * _FAR]
        return make_finding("rate-too-high", evidence, _name_rates(lower))
    return None


def find_divergence(history: History) -> Finding | None:
    """A loss far above where the run began, or above what guessing would give, for many steps in a row."""
    steps = history.recent(_NUM_DIVERGED)
    if len(steps) < _NUM_DIVERGED or history.num_steps < 2 * _NUM_DIVERGED:
        return None
    losses = [step.loss for step in steps]
    guessing = math.log(history.plan.corpus.vocab_size)
    began = _initial_loss(history.early, is_trained=history.plan.model.base is not None)
    is_above_begin = min(losses) > began and mean(losses) > max(_DIVERGED * began, began + _LEAST_RISE)
    # Fresh weights may begin far above guessing and need their warmup to come down: that is no loss that ran away.
    has_fallen = any(block.loss < guessing for block in history.blocks)
    is_above_guessing = min(losses) > (guessing if has_fallen else max(guessing, began)) + 0.1 * guessing
    if not (is_above_begin or is_above_guessing):
        return None
    rate, norm = history.plan.optimizer.learning_rate, median(step.grad_norm for step in steps)
    return make_finding(
        "divergence",
        f"{phrase('mean-loss', loss=f'{mean(losses):.3g}', num=len(losses))}; "
        f"{phrase('began-guessing', began=f'{began:.3g}', guessing=f'{guessing:.3g}')}; "
        f"learning_rate {rate:.2g}, {phrase('gradient-norm', norm=f'{norm:.2g}')}",
        _lower_rates(history),
        stops_run=True,
    )


def find_rise(history: History) -> Finding | None:
    """A loss that fell and has lost half of what it had gained, by more than the noise of its batches."""
    blocks = [block.loss for block in history.blocks]
    if len(blocks) < 2 * _NUM_BLOCKS:
        return None
    means = [mean(blocks[end - _NUM_BLOCKS : end]) for end in range(_NUM_BLOCKS, len(blocks) + 1)]
    began = _initial_loss(history.early, is_trained=history.plan.model.base is not None)
    best, now = min(means[:-_NUM_BLOCKS]), means[-1]
    # Neighbours differ by the spread of a block times 0.95 in the median; a loss that falls only makes it more.
    spread = median(abs(after - before) for before, after in pairwise(blocks)) / 0.95
    if now < best + max(_LEAST_RISE, 0.5 * (began - best)) + _NUM_SPREADS * spread:
        return None
    where = history.blocks[means.index(best) + _NUM_BLOCKS - 1].last_step
    saved = [save for save in _kept_saves(history) if save.step <= where]
    settings = [f"model_name_or_path: RUN/checkpoints/{saved[-1].checkpoint}"] if saved else []
    return make_finding(
        "loss-rising",
        f"{phrase('risen', best=f'{best:.3f}', where=where, now=f'{now:.3f}', num=_NUM_BLOCKS * BLOCK)}; "
        f"{phrase('began', began=f'{began:.3f}')}",
        ", ".join([*settings, _lower_rates(history)]),
    )


def _kept_saves(history: History) -> list[SavedEvent]:
    """The checkpoints that are surely there still: of a limited number the newest, and the best."""
    asked = [save for save in history.saves if save.reason != "clock"]
    limit, evaluations = history.plan.save_total_limit, history.evaluations
    best = min(evaluations, key=lambda point: point.event.loss).event.step if evaluations else None
    newest = asked if limit is None else asked[-max(1, limit - 1) :]
    return [save for save in asked if save in newest or save.step == best]


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
        f"{phrase('spike', loss=f'{highest.loss:.3f}', norm=f'{highest.grad_norm:.2g}', step=highest.step)}; "
        f"{phrase('usual-around', level=f'{level:.3f}', norm=f'{norm:.2g}')}",
        f"max_grad_norm: {wanted:.1g}",
    )


def _other_weights(history: History) -> str:
    """What else could train; empty where all weights do already."""
    adapt = history.plan.adapt
    if adapt is None:
        return ""
    return "method: full" if adapt.target_modules == "all-linear" else "lora_target_modules: all-linear"


def _initial_loss(early: Sequence[StepEvent], *, is_trained: bool) -> float:
    """The loss before training; batches of a model that has been trained differ more, so several are averaged."""
    first = [step.loss for step in early if step.is_finite][: 10 if is_trained else 1]
    return mean(first) if first else math.inf


def _rates(history: History) -> list[tuple[str, float, float]]:
    """The learning rates of a run by their keys, each with the usual one."""
    plan, optimizer = history.plan, history.plan.optimizer
    usual = _USUAL_ADAPTERS if plan.adapt is not None else _USUAL_SCRATCH if plan.model.base is None else _USUAL_BASE
    rates = [("learning_rate", optimizer.learning_rate, usual)]
    if optimizer.name == "muon":
        rates.append(("muon_learning_rate", optimizer.muon_learning_rate, _USUAL_MUON))
    return rates


def _lower_rates(history: History) -> str:
    return _name_rates((key, min(rate / 3, usual)) for key, rate, usual in _rates(history))


def _name_rates(rates: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{key}: {rate:.0e}" for key, rate in rates)
