"""What a plan is expected to take on a card: memory, time, and what else it could be."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# Processes of one run.
MOST_RANKS = 1024


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CardGroup(_Frozen):
    """Cards of one kind that share a run, each with a process of its own, and what joins them; None where not said.

    `card` is a name of the catalogue, None this machine's device. `link_bytes_per_s` is what a card carries to the next
    one of its machine, `network_bytes_per_s` what a machine does to the next one with all its adapters, each way.
    """

    num: int = Field(ge=1, le=MOST_RANKS)
    card: str | None = None
    per_machine: int | None = Field(default=None, ge=1)
    link_bytes_per_s: float | None = Field(default=None, gt=0)
    network_bytes_per_s: float | None = Field(default=None, gt=0)


class MemoryForecast(_Frozen):
    """Bytes at the fullest moment of a run, of several ranks on each of them.

    `peak_bytes` is what PyTorch's allocator reserves, between `peak_low_bytes` and `peak_high_bytes`;
    `allocated_bytes` what tensors hold of it; `context_bytes` what CUDA takes beside it. `breakdown` adds up to
    `peak_bytes`, and on a GPU `context_bytes`; in it "batch", "loss" and "backward" are what these phases made and have
    no other name for. `peak_phase` says where in the run the peak is, `phase_bytes` what tensors hold at the fullest
    moment of each phase, without cuBLAS workspaces and what the allocator holds beyond tensors.
    `limit_bytes` is what the allocator may reserve on the card. `note` says what the figures leave open.
    `host_peak_bytes` is of the process that leads; where several share its machine, `host_other_bytes` of each other
    one and `host_machine_bytes` of all of them. On a CPU, `peak_bytes` and `limit_bytes` are of the one that leads.
    """

    fits: bool
    limit_bytes: int
    peak_bytes: int
    peak_low_bytes: int
    peak_high_bytes: int
    allocated_bytes: int
    context_bytes: int
    breakdown: dict[str, int]
    peak_phase: str
    phase_bytes: dict[str, int]
    host_peak_bytes: int
    disk_bytes: int
    host_other_bytes: int | None = None
    host_machine_bytes: int | None = None
    note: str | None = None


class TimeForecast(_Frozen):
    """Seconds of one step, between `step_low_s` and `step_high_s`, and of the whole run with evaluation and saving.

    `limited_by` names what a step waits for: arithmetic, bandwidth, launches, data or communication. `share_of_peak` is
    of the card's arithmetic; `energy_wh`, from and to, is None where the card's power is not known. `note` says what
    corrected them. Of several ranks all figures are of all of them together: `communication_s` is what the sums and
    gathers of a step take, `exposed_communication_s` what of it no computing hides, and `efficiency` the speed as a
    share of so many times that of one card with the same micro-batches. All three are None for one process, or where
    not known.
    """

    step_s: float
    step_low_s: float
    step_high_s: float
    tokens_per_s: float
    total_s: float
    # What `total_s` holds beside steps; None in plans from before it was told.
    evaluation_s: float | None = None
    num_evaluations: int | None = None
    save_s: float | None = None
    num_saves: int | None = None
    limited_by: str
    share_of_peak: float
    energy_wh: tuple[float, float] | None
    note: str | None = None
    communication_s: float | None = None
    exposed_communication_s: float | None = None
    efficiency: float | None = None


class Forecast(_Frozen):
    """Memory and time on one card, or on each of a `group`; `time` is None for a card whose rates are not known.

    `is_refined` is false where the plan is compiled and its eager step stands in; `is_interpolated` is true where two
    shallow models stand in for a deep compiled one.
    """

    card: str
    memory: MemoryForecast
    time: TimeForecast | None
    is_refined: bool = True
    is_interpolated: bool = False
    group: CardGroup | None = None

    @property
    def num_ranks(self) -> int:
        return 1 if self.group is None else self.group.num


class Alternative(_Frozen):
    """The same training with other settings; `is_refined` and `is_interpolated` are those of its forecast."""

    settings: dict[str, Any]
    peak_bytes: int
    step_s: float | None
    fits: bool
    is_chosen: bool = False
    is_refined: bool = True
    is_interpolated: bool = False
