"""What earlier runs on a card change in the forecast of the next one, and how that is told."""

from onecard.spec import MemoryForecast

# A correction that the digits of a plan do not show.
_UNTOLD_SHARE = 0.0005


def correct_memory(memory: MemoryForecast, factor: float, num_left_out: int) -> MemoryForecast:
    """Corrects what a trace tells by the factor that earlier runs have taught."""
    note = join(memory.note, tell_correction(factor), tell_left_out(num_left_out))
    if factor == 1.0:
        return memory.model_copy(update={"note": note})
    peak = int(memory.peak_bytes * factor)
    slack = memory.breakdown["allocator slack"] + peak - memory.peak_bytes
    return memory.model_copy(
        update={
            "fits": peak <= memory.limit_bytes if factor > 1 else memory.fits or peak <= memory.limit_bytes,
            "peak_bytes": peak,
            "peak_low_bytes": int(memory.peak_low_bytes * factor),
            "peak_high_bytes": int(memory.peak_high_bytes * factor),
            "breakdown": memory.breakdown | {"allocator slack": slack},
            "note": note,
        }
    )


def tell_correction(factor: float) -> str | None:
    """Says by how much a figure was corrected, where its digits show it."""
    return (
        None if abs(factor - 1) < _UNTOLD_SHARE else f"corrected by {factor - 1:+.1%} after earlier runs on this card"
    )


def tell_left_out(num_runs: int) -> str | None:
    """Says how many runs taught nothing."""
    if not num_runs:
        return None
    runs = "1 earlier run" if num_runs == 1 else f"{num_runs} earlier runs"
    return f"{runs} on this card, too far from what was predicted, left out"


def join(*remarks: str | None) -> str | None:
    """One line of the remarks that there are."""
    return "; ".join(remark for remark in remarks if remark) or None
