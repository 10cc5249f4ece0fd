"""What PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF say about GPU memory.

The rules are those of PyTorch 2.13 (c10/core/AllocatorConfig, c10/cuda/CUDAAllocatorConfig).
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onecard.errors import InputError
from onecard.units import MIB, format_bytes

# The old name wins where both are set, even when it is empty: measured with PyTorch 2.13.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_NO_CACHING_VARIABLE = "PYTORCH_NO_CUDA_MEMORY_CACHING"

MIN_LARGE_SEGMENT_BYTES = 10 * MIB
# Intervals of roundup_power2_divisions: below 2 MiB, from 2 MiB, from 4 MiB ... from 32 GiB on.
NUM_ROUNDUP_INTERVALS = 16
# Step in which CUDA's own pool grows: an assumption, NVIDIA documents none.
DRIVER_PAGE_BYTES = 32 * MIB
_NO_ROUNDUP = (0,) * NUM_ROUNDUP_INTERVALS

_DRIVER_POOL = "cudaMallocAsync"
# Keys of memory on the host and of speed: read by PyTorch, nothing that a plan counts.
_WITHOUT_EFFECT = frozenset(
    {
        *("pinned_use_background_threads", "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb"),
        *("pinned_use_cuda_host_register", "pinned_num_register_threads", "pinned_reserve_segment_size_mb"),
        *("pinned_free_catch_all", "release_lock_on_cudamalloc", "graph_capture_record_stream_reuse"),
    }
)


@dataclass(frozen=True)
class AllocatorSettings:
    """Settings of PyTorch's CUDA caching allocator that change how much memory it takes; the defaults are PyTorch's.

    Args:
        expandable_segments: one growing arena per pool instead of one segment per allocation.
        max_split_bytes: blocks of at least this size are never split; None where every block may be.
        max_non_split_rounding_bytes: how much larger than the request a cached block of that kind may be.
        large_segment_bytes: segment for a request of 1 to 10 MiB, and page of the large expandable arena.
        garbage_collection_threshold: share of the cap above which old cached segments are released; 0 is never.
        roundup_power2_divisions: steps between two powers of two, per interval; 0 or 1 rounds to 512 B only.
        per_process_memory_fraction: share of the card's memory that may be reserved.
        backend: `native` or `cudaMallocAsync`, CUDA's own pool, which ignores all of the above but the last.
        rejects_early: out of memory is raised without releasing the cache first.
        is_caching: false where PYTORCH_NO_CUDA_MEMORY_CACHING switches the cache off.
        remarks: what of the environment is assumed or without effect, as sentences.
    """

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = 20 * MIB
    large_segment_bytes: int = 20 * MIB
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: tuple[int, ...] = _NO_ROUNDUP
    per_process_memory_fraction: float = 1.0
    backend: str = "native"
    rejects_early: bool = False
    is_caching: bool = True
    remarks: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_driver_pool(self) -> bool:
        """Whether CUDA's own pool serves tensors. Without the cache every backend goes to CUDA."""
        return self.backend == _DRIVER_POOL and self.is_caching

    @property
    def is_closed(self) -> bool:
        """Whether code that nobody can read decides what is held: CUDA's own, not PyTorch's."""
        return self.backend == _DRIVER_POOL or not self.is_caching

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], platform: str = sys.platform) -> "AllocatorSettings":
        """Reads the settings PyTorch would take from `environ`.

        On Windows PyTorch is built without expandable segments and goes on without them, so they are off there.

        Raises:
            InputError: a key or value PyTorch refuses, all problems together.
        """
        variable = next((name for name in VARIABLES if name in environ), VARIABLES[0])
        values, given, problems = _read_pairs(environ.get(variable, ""))
        large_segment_bytes = values.get("large_segment_bytes", cls.large_segment_bytes)
        for name, key in (
            ("max_split_bytes", "max_split_size_mb"),
            ("max_non_split_rounding_bytes", "max_non_split_rounding_mb"),
        ):
            if name in values and values[name] < large_segment_bytes:
                smallest = format_bytes(large_segment_bytes)
                problems.append(f"{key} is below the size of a large segment ({smallest}): give at least that")
        if problems:
            lines = [f"{variable}={environ[variable]!r} cannot be used:", *(f"  - {problem}" for problem in problems)]
            raise InputError("\n".join(lines))
        values.setdefault("max_non_split_rounding_bytes", large_segment_bytes)
        is_caching = environ.get(_NO_CACHING_VARIABLE) != "1"
        remarks = _find_remarks(given, values, platform, is_caching=is_caching)
        values["expandable_segments"] = values.get("expandable_segments", False) and platform != "win32"
        return cls(**values, is_caching=is_caching, remarks=remarks)


def _find_remarks(given: set[str], values: Mapping[str, Any], platform: str, *, is_caching: bool) -> tuple[str, ...]:
    """Says what the simulation assumes, and which keys change nothing in it."""
    remarks, without_effect = [], given & _WITHOUT_EFFECT
    if not is_caching:
        without_effect = given - {"per_process_memory_fraction"}
        remarks.append(
            f"{_NO_CACHING_VARIABLE}: CUDA is asked for every tensor, which takes far longer than the times given here"
        )
    elif values.get("backend") == _DRIVER_POOL:
        without_effect = given - {"per_process_memory_fraction", "backend"}
        remarks.append(
            f"{_DRIVER_POOL} is CUDA's own pool, closed to simulation: taken as one that grows by "
            f"{format_bytes(DRIVER_PAGE_BYTES)} and fills its gaps, so the band is wider"
        )
    else:
        if values.get("expandable_segments") and platform == "win32":
            without_effect |= {"expandable_segments"}
        if values.get("rejects_early"):
            remarks.append("throw_on_cudamalloc_oom: at the limit nothing cached is given back first")
    if without_effect:
        remarks.append(f"without effect on this plan: {', '.join(sorted(without_effect))}")
    return tuple(remarks)


def _read_pairs(text: str) -> tuple[dict[str, Any], set[str], list[str]]:
    """Splits `key:value,key:[a:b,c:d]` into fields of `AllocatorSettings`, keys, problems; the last of equals wins."""
    values: dict[str, Any] = {}
    given: set[str] = set()
    problems = []
    text = re.sub(r"\s", "", text).removesuffix(",")
    for pair in re.split(r",(?![^\[]*\])", text) if text else ():
        key, colon, value = pair.partition(":")
        given.add(key)
        if key in _WITHOUT_EFFECT:
            continue
        if key not in _READERS:
            known = ", ".join(sorted({*_READERS, *_WITHOUT_EFFECT}))
            problems.append(f"key {key!r} is unknown; known are {known}")
            continue
        field, read, expected = _READERS[key]
        try:
            if not colon:
                raise ValueError("no value")
            values[field] = read(value)
        except ValueError:
            problems.append(f"{key}:{value} is not understood: {expected}")
    return values, given, problems


def _read_flag(text: str) -> bool:
    return {"True": True, "False": False}[_one_of(text, "True", "False")]


def _read_backend(text: str) -> str:
    return _one_of(text, "native", "cudaMallocAsync")


def _one_of(text: str, *choices: str) -> str:
    if text not in choices:
        raise ValueError(text)
    return text


def _read_mib(text: str) -> int:
    return _read_count(text) * MIB


def _read_large_segment(text: str) -> int:
    num_bytes = _read_mib(text)
    if num_bytes <= MIN_LARGE_SEGMENT_BYTES:
        raise ValueError(text)
    return num_bytes


def _read_threshold(text: str) -> float:
    if not 0.0 < float(text) < 1.0:
        raise ValueError(text)
    return float(text)


def _read_fraction(text: str) -> float:
    if not 0.0 <= float(text) <= 1.0:
        raise ValueError(text)
    return float(text)


def _read_count(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError(text)
    return int(text)


def _read_power_of_two(text: str) -> int:
    number = _read_count(text)
    if number == 0 or number & (number - 1):
        raise ValueError(text)
    return number


def _read_divisions(text: str) -> tuple[int, ...]:
    """Reads one number for all sizes, or `[256:1,512:2,>:8]`: MiB at which an interval begins, and its divisions.

    As in PyTorch the first boundary also speaks for everything below it, `>` for everything above the last one, and
    intervals skipped in between are not rounded.
    """
    if not text.startswith("["):
        return (_read_power_of_two(text),) * NUM_ROUNDUP_INTERVALS
    if not text.endswith("]"):
        raise ValueError(text)
    table = list(_NO_ROUNDUP)
    last = 0
    is_first = True
    inner = text[1:-1].removesuffix(",")
    for pair in inner.split(",") if inner else ():
        boundary, _, value = pair.partition(":")
        divisions = 0 if value == "0" else _read_power_of_two(value)
        if boundary == ">":
            table[last + 1 :] = [divisions] * (NUM_ROUNDUP_INTERVALS - last - 1)
            continue
        last = min(_read_power_of_two(boundary).bit_length() - 1, NUM_ROUNDUP_INTERVALS - 1)
        if is_first:
            table[:last] = [divisions] * last
            is_first = False
        table[last] = divisions
    return tuple(table)


_Reader = tuple[str, Callable[[str], Any], str]
# key -> field, how it is read, what is expected
_READERS: dict[str, _Reader] = {
    "expandable_segments": ("expandable_segments", _read_flag, "give True or False"),
    "max_split_size_mb": ("max_split_bytes", _read_mib, "give a whole number of MiB"),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _read_mib, "give a whole number of MiB"),
    "large_segment_size_mb": ("large_segment_bytes", _read_large_segment, "give a whole number of MiB above 10"),
    "garbage_collection_threshold": (
        "garbage_collection_threshold",
        _read_threshold,
        "give a number between 0 and 1, both excluded",
    ),
    "roundup_power2_divisions": (
        "roundup_power2_divisions",
        _read_divisions,
        "give a power of two, or a list like [256:1,512:2,>:8] of powers of two (0 divisions: off)",
    ),
    "per_process_memory_fraction": ("per_process_memory_fraction", _read_fraction, "give a number from 0 to 1"),
    "throw_on_cudamalloc_oom": ("rejects_early", _read_flag, "give True or False"),
    "backend": ("backend", _read_backend, "give native or cudaMallocAsync"),
}
