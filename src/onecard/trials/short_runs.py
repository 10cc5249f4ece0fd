"""Whole trainings in short: the recipe's batch, text, warmup and decay over fewer steps, one model for all of them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from onecard.data import Batch, TrainingData
from onecard.evaluation.heldout import HeldoutLoss, measure_heldout_loss
from onecard.run.feed import Feed
from onecard.run.start import assemble_run
from onecard.spec import Plan, SchedulePlan
from onecard.training.assemble import start_again
from onecard.training.schedule import rate_at
from onecard.trials.steps import Step, make_steps

# Runs are looked at so many times; the losses that are compared are means over a twentieth of the run.
_NUM_LOOKS = 8
_MEAN_SHARE, _LEAST_MEAN = 0.05, 5
# At the same step, on the same text, a run that is behind the best one by half of all that one gains does not catch up:
# what a high rate wins back when it decays is far less.
_MOST_BEHIND, _LEAST_SHARE_OF_RUN = 0.5, 0.5
# Nats above the first loss that no difference between batches explains.
_RISE = 1.0
# fp16 refuses some updates at the start, until its loss scale is found.
_MOST_REFUSED_IN_A_ROW = 8
_TIMED_STEPS, _TIMED_SHARE = 8, 0.03
_EVALUATION_SHARE = 0.1
# A warmup that shrinks with the run ends before moments are known, and high rates would pay for it.
_WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Trial:
    """One short run of `num_steps`, or less where it was `stopped`: then it has no held-out loss.

    `factor` multiplies the recipe's rates; `losses` are those of its steps.
    """

    factor: float
    seed: int
    num_steps: int
    losses: tuple[float, ...]
    heldout_loss: float | None
    standard_error: float | None
    seconds: float
    stopped: str | None = None


@dataclass(frozen=True)
class Leader:
    """The best run of a seed: its training losses, and by how much its held-out loss fell from its start."""

    losses: tuple[float, ...]
    gain: float


@dataclass(frozen=True)
class Speed:
    """Seconds of a step and of one held-out batch, as timed."""

    step_s: float
    evaluation_batch_s: float


def shorten(schedule: SchedulePlan, num_steps: int) -> SchedulePlan:
    """The same shape over fewer steps; the warmup keeps a tenth of them where the schedule has as many."""
    if num_steps >= schedule.num_steps:
        return schedule
    share = num_steps / schedule.num_steps
    warmup = max(round(share * schedule.num_warmup_steps), round(_WARMUP_SHARE * num_steps))
    warmup = min(warmup, schedule.num_warmup_steps)
    # Of cosine and linear the decay is all that is left; wsd has a share of its own.
    is_rest = schedule.num_decay_steps == schedule.num_steps - schedule.num_warmup_steps
    decay = num_steps - warmup if is_rest else min(round(share * schedule.num_decay_steps), num_steps - warmup)
    return schedule.model_copy(update={"num_steps": num_steps, "num_warmup_steps": warmup, "num_decay_steps": decay})


class ShortRuns:
    """Trains one model again and again from its start, by different rates and seeds.

    `start_loss` is the held-out loss before training, once `settle` has been called.
    """

    def __init__(self, plan: Plan, corpus: TrainingData) -> None:
        self._plan, self._corpus = plan, corpus
        self._state = assemble_run(plan, corpus, None)
        self._is_fresh = True
        self._heldout: list[Batch] = []
        self.start_loss = math.nan

    def time(self, budget_s: float) -> Speed:
        """Times a few steps and a held-out batch; a compiler's work is done by then."""
        self._begin(self._plan.seed)
        self._is_fresh = False
        seconds: list[float] = []
        with Feed(self._state, self._corpus) as feed:
            for step in make_steps(self._state, feed, lambda done: 0.0):
                seconds.append(step.seconds)
                if len(seconds) >= _TIMED_STEPS or (len(seconds) > 2 and sum(seconds[1:]) > _TIMED_SHARE * budget_s):
                    break
        self._heldout = self._heldout_batches(1)
        self._evaluate()
        started = time.perf_counter()
        self._evaluate()
        later = sorted(seconds[1:])
        return Speed(later[len(later) // 2], time.perf_counter() - started)

    def settle(self, run_s: float, speed: Speed) -> int:
        """Decides on how many held-out tokens runs of about so many seconds are compared: returns that number.

        They are the same of every run, all of them where that takes at most a tenth of the run's time.
        """
        most = max(1, int(_EVALUATION_SHARE * run_s / max(speed.evaluation_batch_s, 1e-6)))
        self._heldout = self._heldout_batches(most)
        self._begin(self._plan.seed)
        self.start_loss = self._evaluate().loss
        return sum(batch.num_targets for batch in self._heldout)

    def run(self, factor: float, seed: int, num_steps: int, best: Leader | None = None) -> Trial:
        """Trains at `factor` times the recipe's rates; `best` is the best run of this seed and length so far."""
        started = time.perf_counter()
        self._begin(seed)
        self._is_fresh = False
        losses, stopped = self._train(factor, num_steps, best)
        found = self._evaluate() if stopped is None else None
        if found is not None and not math.isfinite(found.loss):
            found, stopped = None, "its held-out loss is not finite"
        return Trial(
            factor=factor,
            seed=seed,
            num_steps=num_steps,
            losses=tuple(losses),
            heldout_loss=found.loss if found else None,
            standard_error=found.standard_error if found else None,
            seconds=time.perf_counter() - started,
            stopped=stopped,
        )

    def _train(self, factor: float, num_steps: int, best: Leader | None) -> tuple[list[float], str | None]:
        """The losses of a run, and why it was stopped, None where it was not."""
        schedule = shorten(self._plan.schedule, num_steps)
        # On a GPU one more step is launched before the last is read.
        rate, last = factor * self._plan.optimizer.learning_rate, schedule.num_steps - 1
        judge = _Judge(num_steps, best)
        with Feed(self._state, self._corpus) as feed:
            for step in make_steps(self._state, feed, lambda done: rate * rate_at(schedule, min(done, last))):
                if (stopped := judge.look(step)) is not None:
                    return judge.losses, stopped
                if len(judge.losses) == num_steps:
                    break
        return judge.losses, None

    def _begin(self, seed: int) -> None:
        state = self._state
        if not self._is_fresh or seed != state.plan.seed:
            state.plan = state.plan.model_copy(update={"seed": seed})
            start_again(state)
        self._is_fresh = True

    def _heldout_batches(self, num_batches: int) -> list[Batch]:
        plan = self._plan
        rows = num_batches * plan.eval_batch_size
        return list(self._corpus.heldout_batches(plan.max_seq_length, plan.eval_batch_size, rows))

    def _evaluate(self) -> HeldoutLoss:
        state = self._state
        return measure_heldout_loss(state.model, state.head, self._heldout, state.plan.attn_implementation)


class _Judge:
    """Looks at a run now and then, and says when it is not worth its end."""

    def __init__(self, num_steps: int, best: Leader | None) -> None:
        self.losses: list[float] = []
        self._num_steps, self._best = num_steps, best
        self._num_refused = 0

    def look(self, step: Step) -> str | None:
        """Takes a step in; says why the run ends here, None where it goes on."""
        self.losses.append(step.loss)
        self._num_refused = 0 if step.is_finite else self._num_refused + 1
        done = len(self.losses)
        if self._num_refused >= _MOST_REFUSED_IN_A_ROW:
            return f"not finite after {done} steps"
        if done % max(1, self._num_steps // _NUM_LOOKS) or done == self._num_steps or done < self._num_steps // 4:
            return None
        own = self._recent(self.losses)
        if own > self.losses[0] + _RISE:
            return f"loss above its start after {done} steps"
        if self._best is None or self._best.gain <= 0 or len(self._best.losses) < done:
            return None
        behind = (own - self._recent(self._best.losses[:done])) / self._best.gain
        if done >= _LEAST_SHARE_OF_RUN * self._num_steps and behind > _MOST_BEHIND:
            return f"behind by {behind:.0%} of what the best run gains, after {done} steps"
        return None

    def _recent(self, losses: Sequence[float]) -> float:
        recent = losses[-max(_LEAST_MEAN, int(_MEAN_SHARE * self._num_steps)) :]
        return sum(recent) / len(recent)
