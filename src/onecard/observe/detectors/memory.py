"""Memory that creeps up, on the card or on the host."""

from itertools import pairwise

from onecard.observe.detectors.batch import smaller_batch
from onecard.observe.detectors.catalogue import make_finding
from onecard.observe.detectors.history import BLOCK, History
from onecard.observe.detectors.phrases import phrase
from onecard.spec import Finding
from onecard.units import MIB, format_bytes, format_seconds

# The longest texts come at any time, so that one rise says nothing: memory must have risen in each of so many parts.
_NUM_PARTS = 5
_BLOCKS_OF_A_PART = 3
_LEAST_RISE = 0.1
_LEAST_BYTES = 256 * MIB
_READINGS_OF_A_PART = 3


def find_card_growth(history: History) -> Finding | None:
    """The allocator's mark, which only rises, rose in each of the last parts of the run."""
    marks = [block.memory_bytes for block in history.blocks if block.memory_bytes is not None]
    parts = marks[-(_NUM_PARTS * _BLOCKS_OF_A_PART + 1) :: _BLOCKS_OF_A_PART]
    if len(parts) < _NUM_PARTS + 1 or not _rises(parts):
        return None
    rise, num_steps = parts[-1] - parts[0], _NUM_PARTS * _BLOCKS_OF_A_PART * BLOCK
    forecast = history.plan.forecast
    told = [
        phrase("grown-over-steps", before=format_bytes(parts[0]), after=format_bytes(parts[-1]), num=num_steps),
    ]
    if forecast is not None and (left := forecast.memory.limit_bytes - parts[-1]) > 0:
        limit = format_bytes(forecast.memory.limit_bytes)
        told.append(phrase("card-full-in", limit=limit, num=left * num_steps // rise))
    return make_finding("card-memory-grows", "; ".join(told), *smaller_batch(history))


def find_host_growth(history: History) -> Finding | None:
    """Private memory of the process rose in each of the last parts of the run."""
    known = [(reading.elapsed_s, reading.own_bytes) for reading in history.devices if reading.own_bytes is not None]
    parts = known[-(_NUM_PARTS * _READINGS_OF_A_PART + 1) :: _READINGS_OF_A_PART]
    if len(parts) < _NUM_PARTS + 1 or not _rises([taken for _, taken in parts]):
        return None
    (begun_s, first), (now_s, last) = parts[0], parts[-1]
    free = history.devices[-1].free_ram_bytes
    told = [
        phrase(
            "grown-over-time",
            before=format_bytes(first),
            after=format_bytes(last),
            time=format_seconds(now_s - begun_s),
        )
    ]
    if free is not None and now_s > begun_s:
        left_s = free * (now_s - begun_s) / (last - first)
        told.append(phrase("host-full-in", time=format_seconds(left_s)))
    return make_finding("host-memory-grows", "; ".join(told), "")


def _rises(parts: list[int]) -> bool:
    rise = parts[-1] - parts[0]
    is_steady = all(after - before > rise / (4 * _NUM_PARTS) for before, after in pairwise(parts))
    return rise >= max(_LEAST_BYTES, _LEAST_RISE * parts[0]) and is_steady
