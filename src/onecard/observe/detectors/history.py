"""What detectors look at: a run's recent events, and what does not change about it."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from onecard.observe.events import (
    DeviceEvent,
    EvaluatedEvent,
    Event,
    FindingEvent,
    RanksEvent,
    RecoveredEvent,
    SampledEvent,
    SavedEvent,
    StepEvent,
)
from onecard.spec import Alternative, Plan

NUM_EARLY = 64
NUM_RECENT = 512
BLOCK = 32
# What costs less than this is not worth a word, and the first seconds of a run say little about its speed.
LEAST_ELAPSED_S = 30.0
# Of the card and the host: so many are looked at, and so few say nothing.
NUM_READINGS, _LEAST_READINGS = 6, 3
# Below it a desktop does what it always does.
OTHERS_CPU_SHARE = 0.25
# Training losses of single steps are noisy: this many are averaged beside a held-out loss.
_NUM_BESIDE = 50
# These change no step.
_OF_EVALUATION = frozenset({"eval_batch_size", "eval_batches"})


@dataclass(frozen=True)
class Surroundings:
    """The machine of a run: `gpus` by name, `torch_cuda` the CUDA that PyTorch is built for (None: none).

    `is_device_asked` says that the recipe names the device, so that nobody need be told of another.
    """

    gpus: tuple[str, ...] = ()
    torch_cuda: str | None = None
    is_device_asked: bool = False
    platform: str = "linux"
    num_cores: int = 1


class Block(NamedTuple):
    """`BLOCK` steps in a row, without those that were refused: mean loss, and what the card's allocator had taken."""

    last_step: int
    loss: float
    memory_bytes: int | None


class Evaluation(NamedTuple):
    """A held-out loss and the mean training loss of the steps before it."""

    event: EvaluatedEvent
    train_loss: float
    tokens_seen: int


# The ladder of a plan, a row at a time: the plan in force, what is changed in it, and how much of the run is left in
# seconds. None where that cannot be told, or takes too long beside what is left.
Foresee = Callable[[Plan, Mapping[str, Any], float], Alternative | None]


def foresee_nothing(plan: Plan, changes: Mapping[str, Any], left_s: float) -> Alternative | None:
    """Stands for a plan that cannot be asked."""
    return None


@dataclass
class History:
    """A run until now. `steps` are the last 512 or more, `early` its first 64, `blocks` means over all of it.

    `plan` is the one in force: what a run had to change is changed in it, and its forecast is dropped with the step it
    was made for.
    """

    plan: Plan
    surroundings: Surroundings = field(default_factory=Surroundings)
    early: list[StepEvent] = field(default_factory=list)
    steps: list[StepEvent] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    saves: list[SavedEvent] = field(default_factory=list)
    devices: list[DeviceEvent] = field(default_factory=list)
    ranks: list[RanksEvent] = field(default_factory=list)
    num_samplings: int = 0
    evaluating_s: float = 0.0
    sampling_s: float = 0.0
    saving_s: float = 0.0
    ask_plan: Foresee = foresee_nothing

    @classmethod
    def of(cls, plan: Plan, events: Iterable[Event], surroundings: Surroundings | None = None) -> "History":
        history = cls(plan, surroundings or Surroundings())
        for event in events:
            history.add(event)
        return history

    def add(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._add_step(event)
            case EvaluatedEvent():
                self.evaluating_s += event.seconds
                losses = [step.loss for step in self.steps[-_NUM_BESIDE:] if step.is_finite]
                if losses:
                    seen = self.steps[-1].tokens_seen
                    self.evaluations.append(Evaluation(event, statistics.fmean(losses), seen))
            case SampledEvent():
                self.num_samplings += 1
                self.sampling_s += event.seconds
            case SavedEvent():
                self.saving_s += event.paused_s
                self.saves.append(event)
            case DeviceEvent():
                self.devices.append(event)
            case RanksEvent():
                self.ranks.append(event)
            case RecoveredEvent():
                self._follow(event.settings)
            case FindingEvent(id="compile-failed"):
                self._follow({"torch_compile": False})

    @property
    def elapsed_s(self) -> float:
        return self.steps[-1].elapsed_s if self.steps else 0.0

    @property
    def is_on_gpu(self) -> bool:
        return self.plan.device.startswith("cuda")

    @property
    def may_compute(self) -> float:
        """Share of the time that the plan lets the device compute."""
        return self.plan.max_power_share or 1.0

    @property
    def others_cpu_share(self) -> float:
        """Share of the CPU that other programs took, as the last readings say; 0 with fewer than three that do."""
        shares = [
            reading.cpu_share - reading.own_cpu_share
            for reading in self.devices[-NUM_READINGS:]
            if reading.cpu_share is not None and reading.own_cpu_share is not None
        ]
        return mean(shares) if len(shares) >= _LEAST_READINGS else 0.0

    def foresee(self, changes: Mapping[str, Any]) -> Alternative | None:
        """What the plan says of itself with some settings changed, a row of its ladder."""
        if not self.steps:
            return None
        left_s = (self.plan.schedule.num_steps - self.num_steps) * self.elapsed_s / self.num_steps
        return self.ask_plan(self.plan, changes, left_s)

    @property
    def num_steps(self) -> int:
        """Updates so far."""
        return self.steps[-1].step if self.steps else 0

    @property
    def epochs(self) -> float:
        """Passes over the training text so far."""
        tokens = self.steps[-1].tokens_seen if self.steps else 0
        return tokens / max(1, self.plan.corpus.num_train_tokens)

    def recent(self, number: int) -> list[StepEvent]:
        """The last steps that were applied, among the last `number`."""
        return [step for step in self.steps[-number:] if step.is_finite]

    def applied(self, number: int) -> list[StepEvent]:
        """The last `number` steps that were applied, however many were refused between them."""
        return [step for step in self.steps if step.is_finite][-number:]

    def settled(self, number: int) -> list[StepEvent]:
        """The last `number` steps, once there are so many after warmup; else none."""
        recent = self.recent(number)
        is_settled = len(recent) == number and recent[0].step > self.plan.schedule.num_warmup_steps
        return recent if is_settled else []

    def is_long_enough(self) -> bool:
        """Whether the run has gone on for so long that its times mean something."""
        return self.elapsed_s >= LEAST_ELAPSED_S and len(self.steps) >= 20

    def _follow(self, settings: Mapping[str, Any]) -> None:
        if not settings:
            return
        reasons = self.plan.reasons | dict.fromkeys(settings, "changed in the run")
        update: dict[str, Any] = {**settings, "reasons": reasons}
        if settings.keys() - _OF_EVALUATION:
            update |= {"forecast": None, "alternatives": ()}
        self.plan = self.plan.model_copy(update=update)

    def _add_step(self, step: StepEvent) -> None:
        if len(self.early) < NUM_EARLY:
            self.early.append(step)
        self.steps.append(step)
        if len(self.steps) >= 2 * NUM_RECENT:
            del self.steps[:NUM_RECENT]
        if step.step % BLOCK == 0 and (applied := self.recent(BLOCK)):
            loss = statistics.fmean(past.loss for past in applied)
            self.blocks.append(Block(step.step, loss, step.memory_bytes))


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
