"""How long, how large, how often."""

import math
from dataclasses import dataclass

from onecard.errors import InputError
from onecard.spec import CorpusFacts, Recipe, SchedulePlan
from onecard.training.schedule import find_shape, rate_at
from onecard.units import format_count

# Tokens of one micro-batch where nothing is asked for: enough to fill the device, little enough to fit.
_MICRO_BATCH_TOKENS = {"cpu": 8192, "cuda": 16384}
_STEP_TOKENS = {"cpu": 8192, "cuda": 65536}
_STEP_CHATS = 32
_WARMUP_SHARE = 0.02
_NUM_INTERVALS = 10
_CURVE_POINTS = 1000


@dataclass(frozen=True)
class BatchSizes:
    """Sequences per micro-batch, step and evaluation batch."""

    micro: int
    total: int
    evaluation: int


def resolve_batch(recipe: Recipe, kind: str, reasons: dict[str, str]) -> BatchSizes:
    """Resolves the batch; a given micro-batch is binding, and both numbers given are the effective batch."""
    length = recipe.max_seq_length
    micro, accumulation = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    total = recipe.total_batch_size or (recipe.total_batch_tokens and recipe.total_batch_tokens // length)
    most = max(1, _MICRO_BATCH_TOKENS[kind] // length)
    if total is None and recipe.task == "sft" and micro == "auto":
        accumulated = 1 if accumulation == "auto" else accumulation
        total = accumulated * max(1, _STEP_CHATS // accumulated)
        reasons["total_batch_size"] = f"about {_STEP_CHATS} chats per step"
    if total is None:
        if micro != "auto":
            total = micro * (1 if accumulation == "auto" else accumulation)
        else:
            accumulated = 1 if accumulation == "auto" else accumulation
            total = accumulated * max(1, _STEP_TOKENS[kind] // (length * accumulated))
            reasons["total_batch_size"] = f"about {format_count(_STEP_TOKENS[kind])} tokens per step"
    if micro == "auto" and accumulation == "auto":
        micro = min(most, int(total))
        reasons["micro_batch_size"] = f"at most {format_count(_MICRO_BATCH_TOKENS[kind])} tokens at once"
    elif micro == "auto":
        micro = _share_out(int(total), int(accumulation))
        reasons["micro_batch_size"] = f"{total} sequences in {accumulation} micro-batches"
    evaluation = recipe.per_device_eval_batch_size
    if evaluation == "auto":
        evaluation = max(micro, most)
    return BatchSizes(int(micro), int(total), int(evaluation))


def _share_out(total: int, accumulation: int) -> int:
    """Size of a micro-batch; all but the last have it.

    Not every number of micro-batches can be had so: 9 sequences are 3 x 3 or 4 x 2 + 1, never 4 micro-batches.
    """
    micro = -(-total // accumulation)
    if -(-total // micro) != accumulation:
        raise InputError(
            f"{total} sequences per step cannot be cut into {accumulation} micro-batches of one size and a smaller "
            f"last one: set gradient_accumulation_steps to {-(-total // micro)}, or the total to {micro * accumulation}"
        )
    return micro


def tokens_per_step(recipe: Recipe, corpus: CorpusFacts | None, total: int) -> int:
    """Tokens of a step of `total` sequences; of chats, whose lengths differ, the mean where it is known."""
    if corpus is not None and corpus.num_train_rows:
        return max(1, round(total * corpus.num_train_tokens / corpus.num_train_rows))
    return total * recipe.max_seq_length


def count_steps(recipe: Recipe, corpus: CorpusFacts | None, total: int, reasons: dict[str, str]) -> int | None:
    """Number of updates of `total` sequences that steps, epochs or tokens ask for; None where only hours or the text
    itself can tell. An epoch of chats is each of them once.

    Raises:
        InputError: no duration is given.
    """
    if recipe.max_steps is not None:
        return recipe.max_steps
    if recipe.num_train_epochs is not None:
        if corpus is None:
            return None
        epochs = recipe.num_train_epochs
        if corpus.num_train_rows:
            steps, one = epochs * corpus.num_train_rows / total, f"{format_count(corpus.num_train_rows)} chats"
        else:
            steps = epochs * corpus.num_train_tokens / tokens_per_step(recipe, corpus, total)
            one = f"{format_count(corpus.num_train_tokens)} tokens"
        reasons["schedule.num_steps"] = f"{epochs:g} x {one}"
        return max(1, math.ceil(steps))
    if recipe.max_tokens is not None:
        reasons["schedule.num_steps"] = f"{format_count(recipe.max_tokens)} tokens"
        return max(1, math.ceil(recipe.max_tokens / tokens_per_step(recipe, corpus, total)))
    if recipe.max_hours is None:
        raise InputError("no duration is given: set max_steps, num_train_epochs, max_tokens or max_hours")
    return None


def make_schedule(recipe: Recipe, num_steps: int) -> SchedulePlan:
    """Resolves warmup and decay for a number of steps.

    Raises:
        InputError: the schedule is unknown or its warmup is longer than the run.
    """
    # As in transformers, whose files have both: steps win, and 0 steps say nothing beside a share.
    if recipe.warmup_steps or (recipe.warmup_steps == 0 and recipe.warmup_ratio is None):
        warmup = recipe.warmup_steps
    else:
        warmup = round((recipe.warmup_ratio if recipe.warmup_ratio is not None else _WARMUP_SHARE) * num_steps)
    if warmup > num_steps:
        raise InputError(
            f"warmup_steps {warmup} is more than the {num_steps} steps of the run: lower it, or use warmup_ratio"
        )
    decay = round(recipe.decay_ratio * num_steps) if recipe.lr_scheduler_type == "wsd" else num_steps - warmup
    schedule = SchedulePlan(
        name=recipe.lr_scheduler_type,
        num_steps=num_steps,
        num_warmup_steps=warmup,
        num_decay_steps=min(decay, num_steps - warmup),
        min_lr_ratio=recipe.min_lr_ratio,
    )
    _check_curve(schedule)
    return schedule


def _check_curve(schedule: SchedulePlan) -> None:
    """Runs through the rates of a run, up to a thousand of them, so that it does not end in the middle over one."""
    num_points = min(schedule.num_steps, _CURVE_POINTS)
    for step in (point * (schedule.num_steps - 1) // max(1, num_points - 1) for point in range(num_points)):
        try:
            find_shape(schedule.name)  # which a run that is all warmup never asks
            rate = rate_at(schedule, step)
            problem = None if math.isfinite(rate) and rate >= 0 else f"it gives {rate}"
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # the user's own code may do anything
            problem = f"it raises {type(error).__name__}: {error}"
        if problem:
            raise InputError(
                f"lr_scheduler_type {schedule.name!r} cannot be used: {problem} after {step} of {schedule.num_steps} "
                "steps. A schedule gives a number of 0 or more for every progress from 0 to 1"
            )


def resolve_interval(given: int | str, num_steps: int, steps_per_epoch: int) -> int:
    """Steps between evaluations, samples or checkpoints; 0 becomes the whole run."""
    if given == "epoch":
        return min(steps_per_epoch, num_steps)
    if given == "auto":
        return max(1, math.ceil(num_steps / _NUM_INTERVALS))
    return int(given) or num_steps
