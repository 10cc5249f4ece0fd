"""Proposes a learning rate: short whole runs over a ladder of rates, a second seed for the noise, a parabola."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from onecard.data import TrainingData
from onecard.errors import InputError
from onecard.spec import Plan
from onecard.trials.ladder import factor_of, next_rung
from onecard.trials.proposal import SEED_STEP, Proposal, losses_of, propose
from onecard.trials.short_runs import Leader, ShortRuns, Speed, Trial

# What a search takes where the recipe's rate is not far off: six quarter runs, six whole ones, and three of those again
# with another seed.
_TYPICAL_RUNS = 11
_LEAST_STEPS = 30
_QUARTER = 4
_NUM_SECOND = 3
# Evaluating and starting again, as a share of the steps of a run.
_BESIDE_STEPS = 0.15


@dataclass(frozen=True)
class Budget:
    """How much: `lengths` are the steps of the short and of the long runs (or of the long ones alone), of `of_steps`.

    `run_s` is about what a long one takes, `search_s` the whole search; losses are those of `num_heldout_tokens`, and
    before training `start_loss`.
    """

    lengths: tuple[int, ...]
    of_steps: int
    step_s: float
    run_s: float
    search_s: float
    num_heldout_tokens: int
    start_loss: float

    @property
    def num_steps(self) -> int:
        return self.lengths[-1]


@dataclass
class RateSearch:
    """All runs of a search in their order, and what follows from them; `proposal` is None where no run ended well."""

    plan: Plan
    budget: Budget
    trials: list[Trial] = field(default_factory=list)
    seconds: float = 0.0
    is_cut_short: bool = False
    was_stopped: bool = False

    @property
    def proposal(self) -> Proposal | None:
        return propose(self.trials, self.plan.seed, self.budget.lengths, self.budget.of_steps)

    def rates_of(self, factor: float) -> dict[str, float]:
        """The recipe's rates times a factor, by key, with two digits; Muon's goes with AdamW's."""
        settings = self.plan.optimizer
        rates = {"learning_rate": settings.learning_rate}
        if settings.name == "muon":
            rates["muon_learning_rate"] = settings.muon_learning_rate
        return {key: float(f"{factor * rate:.2g}") for key, rate in rates.items()}


OnBudget = Callable[[Budget], None]
OnTrial = Callable[[Trial], None]


def find_rate(plan: Plan, corpus: TrainingData, minutes: float, on_budget: OnBudget, on_trial: OnTrial) -> RateSearch:
    """Searches the rate of a plan for about so many minutes; Ctrl+C ends it with what is known by then.

    Raises:
        InputError: nothing is held out, or the minutes do not even allow for short runs.
    """
    if not corpus.has_heldout:
        raise InputError(
            "find-lr compares rates by their loss on held-out text, and nothing is held out: set eval_fraction to "
            "0.05, or name an eval_dataset"
        )
    started = time.monotonic()
    runs = ShortRuns(plan, corpus)
    budget = _settle(runs, plan, minutes, runs.time(60 * minutes))
    on_budget(budget)
    search = RateSearch(plan, budget)
    try:
        for rung, seed, num_steps in _order(search):
            run_s = budget.run_s * num_steps / budget.num_steps
            if search.trials and time.monotonic() - started + run_s > 60 * minutes:
                search.is_cut_short = True
                break
            best = _leader(search, seed, num_steps)
            search.trials.append(runs.run(factor_of(rung), seed, num_steps, best))
            on_trial(search.trials[-1])
    except KeyboardInterrupt:
        if not search.trials:
            raise
        search.was_stopped = True
    search.seconds = time.monotonic() - started
    return search


def _settle(runs: ShortRuns, plan: Plan, minutes: float, speed: Speed) -> Budget:
    """As many steps as the minutes allow for each run, all of the recipe's at most."""
    of_steps, cost_s = plan.schedule.num_steps, (1 + _BESIDE_STEPS) * speed.step_s
    num_steps = min(of_steps, int(60 * minutes / (_TYPICAL_RUNS * cost_s)))
    least = min(of_steps, _LEAST_STEPS)
    if num_steps < least:
        needed = math.ceil(least * _TYPICAL_RUNS * cost_s / 60)
        raise InputError(
            f"--minutes {minutes:g} would leave {num_steps} steps for each of about {_TYPICAL_RUNS} runs, at "
            f"{speed.step_s:.3g} s per step: too few to tell rates apart. Give --minutes {needed}, or smaller steps "
            "(total_batch_size, max_seq_length) where the run will have them, too"
        )
    short = num_steps // _QUARTER
    lengths = (short, num_steps) if short >= _LEAST_STEPS else (num_steps,)
    num_tokens = runs.settle(num_steps * speed.step_s, speed)
    run_s = num_steps * cost_s
    return Budget(lengths, of_steps, speed.step_s, run_s, _TYPICAL_RUNS * run_s, num_tokens, runs.start_loss)


def _order(search: RateSearch) -> Iterator[tuple[int, int, int]]:
    """Rung, seed and steps of the next run, by those that were made: each length's ladder, then another seed."""
    trials, seed, start = search.trials, search.plan.seed, 0
    for num_steps in search.budget.lengths:
        is_last = num_steps == search.budget.num_steps
        while (rung := next_rung(losses_of(trials, seed, num_steps), start, is_fine=is_last)) is not None:
            yield rung, seed, num_steps
        found = losses_of(trials, seed, num_steps)
        start = min(found, key=lambda rung: (found[rung], rung))
    first = {rung: loss for rung, loss in found.items() if math.isfinite(loss)}
    for rung in sorted(first, key=lambda rung: first[rung])[:_NUM_SECOND]:
        yield rung, seed + SEED_STEP, search.budget.num_steps


def _leader(search: RateSearch, seed: int, num_steps: int) -> Leader | None:
    """The best run so far on the same batches and of the same length."""
    done = [
        (trial.heldout_loss, trial.losses)
        for trial in search.trials
        if (trial.seed, trial.num_steps) == (seed, num_steps) and trial.heldout_loss is not None
    ]
    if not done:
        return None
    loss, losses = min(done)
    return Leader(losses, search.budget.start_loss - loss)


def list_warnings(search: RateSearch) -> list[str]:
    """What the answer does not say by itself."""
    budget, proposal, found = search.budget, search.proposal, []
    if search.was_stopped:
        found.append("stopped by hand: this is what was known by then")
    if search.is_cut_short:
        found.append("the time was over before all runs were made: with more --minutes the answer is surer")
    if proposal is None:
        found.append("no whole run came to its end: the rates tried are too high, or something else is wrong")
        return found
    if proposal.fit is None:
        found.append(
            "the runs show no minimum inside of what was tried: this is the best run, not the bottom of a curve"
        )
    if proposal.seed_spread is None:
        found.append("there was no time for a second seed, so chance is known only by how far runs lie off the fit")
    if budget.num_steps == budget.of_steps:
        return found
    times = f"{budget.of_steps / budget.num_steps:.3g}"
    rule = "longer runs want lower rates (Bjorck et al. 2025, arXiv:2409.19913)"
    if proposal.shift_per_fourfold is None:
        found.append(f"the run is {times} times as long as these, and {rule}: take the lower end of what is flat")
    else:
        found.append(
            f"the run is {times} times as long as these, and {rule}: the proposal goes on by what moved from "
            f"{budget.lengths[0]} to {budget.num_steps} steps, "
            f"{proposal.shift_per_fourfold:+.2f} octaves per factor of 4, "
            "which is a guess beyond what was measured"
        )
    return found
