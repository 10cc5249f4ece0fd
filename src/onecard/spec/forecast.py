"""What a plan is expected to take on a card: memory, time, and what else it could be."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MemoryForecast(_Frozen):
    """Bytes at the fullest moment of a run.

    `peak_bytes` is what PyTorch's allocator reserves, between `peak_low_bytes` and `peak_high_bytes`;
    `allocated_bytes` what tensors hold of it; `context_bytes` what CUDA takes beside it. `breakdown` adds up to
    `peak_bytes`, and on a GPU `context_bytes`; in it "batch", "loss" and "backward" are what these phases made and have
    no other name for. `peak_phase` says where in the run the peak is, `phase_bytes` what tensors hold at the fullest
    moment of each phase, without cuBLAS workspaces and what the allocator holds beyond tensors.
    `limit_bytes` is what the allocator may reserve on the card. `note` says what the figures leave open.
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
    note: str | None = None


class TimeForecast(_Frozen):
    """Seconds of one step, between `step_low_s` and `step_high_s`, and of the whole run with evaluation and saving.

    `limited_by` names what a step waits for: arithmetic, bandwidth, launches or data. `share_of_peak` is of the card's
    arithmetic; `energy_wh`, from and to, is None where the card's power is not known. `note` says what corrected them.
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


class Forecast(_Frozen):
    """Memory and time on one card; `time` is None for a card whose rates are not known.

    `is_refined` is false where the plan is compiled and its eager step stands in; `is_interpolated` is true where two
    shallow models stand in for a deep compiled one.
    """

    card: str
    memory: MemoryForecast
    time: TimeForecast | None
    is_refined: bool = True
    is_interpolated: bool = False


class Alternative(_Frozen):
    """The same training with other settings; `is_refined` and `is_interpolated` are those of its forecast."""

    settings: dict[str, Any]
    peak_bytes: int
    step_s: float | None
    fits: bool
    is_chosen: bool = False
    is_refined: bool = True
    is_interpolated: bool = False
