"""What happened in a run: one frozen event each, one line of JSON each.

Events hold plain numbers and text only, so that whoever reads the record needs neither torch nor the run's objects.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

SaveReason = Literal["interval", "best", "final", "interrupted", "clock"]
RecoveredProblem = Literal["out of memory", "not finite"]
FinishReason = Literal["completed", "early stopping", "interrupted", "diverged", "time limit"]

# Two runs of one plan write equal records but for checkpoints of these reasons, these fields, and what
# `depends_on_clock` names.
CLOCK_REASONS = frozenset({"interrupted", "clock"})
CLOCK_FIELDS = frozenset(
    {"elapsed_s", "step_s", "tokens_per_s", "wait_s", "share_of_peak", "memory_bytes", "held_bytes", "seconds"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """One optimizer update. `is_finite` is false where the update was refused; `wait_s` is waiting for data."""

    event: ClassVar[str] = "step"
    step: int
    elapsed_s: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_target_tokens: int
    tokens_seen: int
    is_finite: bool
    step_s: float
    tokens_per_s: float
    wait_s: float
    share_of_peak: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedEvent:
    """A held-out loss in nats per target token; `seconds` is how long measuring it took."""

    event: ClassVar[str] = "evaluated"
    step: int
    elapsed_s: float
    loss: float
    bits_per_byte: float | None
    standard_error: float
    num_target_tokens: int
    is_best: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredEvent:
    """Scores of a checkpoint by a task: over a fixed part of its `n` items, or over all (`is_whole`).

    `standard_error` and `n` belong to `metric`, the score that ranks; `is_best` is against those before over the same
    items. `seconds` count in no `elapsed_s`.
    """

    event: ClassVar[str] = "scored"
    step: int
    elapsed_s: float
    checkpoint: str
    task: str
    metric: str
    scores: dict[str, float]
    standard_error: float
    n: int
    is_whole: bool
    is_best: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenEvent:
    """The best checkpoint by a task, over all of its `n` items.

    Of `num_scored` checkpoints these `finalists` were measured on them; `undecided` are those of them that the items
    do not tell from the best.
    """

    event: ClassVar[str] = "chosen"
    step: int
    elapsed_s: float
    task: str
    metric: str
    checkpoint: str
    value: float
    standard_error: float
    n: int
    num_scored: int
    finalists: tuple[str, ...]
    undecided: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and what the model wrote after it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledEvent:
    """Texts the model wrote at this step."""

    event: ClassVar[str] = "sampled"
    step: int
    elapsed_s: float
    samples: tuple[Sample, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedEvent:
    """A checkpoint, by the name of its folder.

    `seconds` is how long writing it took, `wait_s` how long training stood still for it, None before that was counted.
    """

    event: ClassVar[str] = "saved"
    step: int
    elapsed_s: float
    checkpoint: str
    reason: SaveReason
    num_bytes: int
    seconds: float
    wait_s: float | None = None

    @property
    def paused_s(self) -> float:
        """Seconds that training lost; of old records what writing took, for nothing went on meanwhile."""
        return self.seconds if self.wait_s is None else self.wait_s


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingEvent:
    """A `spec.Finding` and the step at which it was made.

    `id` names it in the catalogue of findings; `is_timed` says that it rests on clocks and sensors, so that another
    run of the same plan may not have it.
    """

    event: ClassVar[str] = "finding"
    step: int
    elapsed_s: float
    symptom: str
    evidence: str
    likely_cause: str
    remedy: str
    stops_run: bool = False
    id: str = ""
    is_timed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEvent:
    """What sensors said at a moment; None where one is missing or does not answer.

    Shares lie between 0 and 1. `gpu_share` is the part of the last moments in which the card computed at all;
    `card_bytes` what everybody holds on the card, `others_bytes` what `num_others` other processes hold of it that
    compute there. `own_bytes` is this process's private memory, `free_ram_bytes` what the machine has left; `cpu_share`
    of all cores, `own_cpu_share` the part of this process.
    """

    event: ClassVar[str] = "device"
    step: int
    elapsed_s: float
    gpu_share: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    usual_power_limit_w: float | None = None
    throttled_by: tuple[str, ...] = ()
    card_bytes: int | None = None
    card_total_bytes: int | None = None
    num_others: int | None = None
    others_bytes: int | None = None
    own_bytes: int | None = None
    free_ram_bytes: int | None = None
    cpu_share: float | None = None
    own_cpu_share: float | None = None
    on_battery: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksEvent:
    """How the processes of a run kept up with one another over the last `num_steps`, by rank, as means of a step.

    `step_s` is the time of a step, the same for all; `forward_s` what a rank's own forward passes over its
    `num_tokens` took, which wait for nobody; `data_s` its waiting for data.
    """

    event: ClassVar[str] = "ranks"
    step: int
    elapsed_s: float
    num_steps: int
    step_s: float
    forward_s: tuple[float, ...]
    data_s: tuple[float, ...]
    num_tokens: tuple[float, ...]

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds of a step that each rank needs for its share: all of it for the slowest.

        Backward passes and the update, which cannot be told from waiting, count in proportion to the forward passes.
        """
        pairs = list(zip(self.forward_s, self.data_s, strict=True))
        factor = min(max(0.0, self.step_s - data) / max(forward, 1e-9) for forward, data in pairs)
        return tuple(data + factor * forward for forward, data in pairs)

    @property
    def waiting_shares(self) -> tuple[float, ...]:
        """Part of the time that each rank waits for slower ones."""
        return tuple(max(0.0, 1 - busy / max(self.step_s, 1e-9)) for busy in self.busy_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredEvent:
    """What went wrong without ending the run, and how it goes on.

    `during` is what was going on, `remedy` what is done instead. Where memory ran out, `settings` are those of the plan
    that are others from now on, and `held_bytes` says who held the memory. A run that went back stands at `step` again
    after it had come to `returned_from`; `position` samples come before its next one.
    """

    event: ClassVar[str] = "recovered"
    step: int
    elapsed_s: float
    problem: RecoveredProblem
    during: str
    evidence: str
    remedy: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    held_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    returned_from: int | None = None
    position: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """The end of a run, or of the part of it until the next resume. `loss` is the last held-out one."""

    event: ClassVar[str] = "finished"
    step: int
    elapsed_s: float
    reason: FinishReason
    loss: float | None
    best_loss: float | None
    best_step: int | None
    tokens_seen: int
    num_steps: int
    tokens_per_s: float
    seconds: float


Event = (
    StepEvent
    | EvaluatedEvent
    | SampledEvent
    | SavedEvent
    | ScoredEvent
    | ChosenEvent
    | FindingEvent
    | DeviceEvent
    | RanksEvent
    | RecoveredEvent
    | FinishedEvent
)


def named_scores(event: ScoredEvent) -> dict[str, float]:
    """Gives scores by the names of their curves; those over all items of a task have curves of their own."""
    group = f"{event.task} (whole)" if event.is_whole else event.task
    return {f"{group}/{name}": value for name, value in event.scores.items()}


def depends_on_clock(event: Event) -> bool:
    """Whether the event as a whole is a matter of time and sensors, and so no part of what a run repeats."""
    return isinstance(event, DeviceEvent | RanksEvent) or (isinstance(event, FindingEvent) and event.is_timed)
