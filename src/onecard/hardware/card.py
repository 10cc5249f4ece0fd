"""What a card can do, and how much of its memory training gets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onecard.units import GIB

CardHost = Literal["linux-headless", "linux-desktop", "windows", "wsl"]

# Of all numbers here the sources are in catalogue.toml, which names them for every card.
_INLINE_ECC_SHARE = 1 / 16
_DRIVER_SHARE = 0.02
_DESKTOP_BYTES = int(0.45 * GIB)
_WINDOWS_SHARE = 0.81
_CONTEXT_BYTES = int(0.45 * GIB)
_WORKSPACE_BYTES = 8_519_680
_LARGE_WORKSPACE_BYTES = 33_554_432
_LARGE_WORKSPACE_MAJORS = (9, 10, 12)
# GT/s of a lane by generation; 128 of 130 bits are data.
_LANE_RATES = {"3.0": 8e9, "4.0": 16e9, "5.0": 32e9}


# Figures that a row holds; `figures` adds what follows from them.
STORED = (
    "memory_bytes",
    "visible_bytes",
    "has_inline_ecc",
    "bandwidth_bytes_per_s",
    "bandwidth_range_bytes_per_s",
    "flops_16bit",
    "fp16_flops",
    "tf32_flops",
    "fp32_flops",
    "fp8_flops",
    "num_sms",
    "boost_clock_hz",
    "boost_clock_range_hz",
    "l2_bytes",
    "compute_capability",
    "tdp_w",
    "power_limits_w",
    "launch_s",
    "pcie",
    "nvlink_bytes_per_s",
)


@dataclass(frozen=True)
class Source:
    """Where a figure comes from; `date` is that of the source, or the day it was read where it bears none."""

    id: str
    text: str
    date: str
    url: str | None = None


@dataclass(frozen=True)
class Card:
    """One row of the catalogue, or a local row measured on this machine.

    Rates of catalogue rows are peaks, dense and summed in fp32; those of local rows are what large operations reached.
    `flops_16bit` is for bf16 and fp16, and None where fp16 is no faster than fp32. `driver_names` are those of NVML;
    several cards may share one and differ in memory. Of a laptop's card, what its power limit decides is also given as
    a range. `pcie` is the slot as in "4.0 x16"; `nvlink_bytes_per_s`, each way, is there where every such card in a
    machine is joined by it. `sources` has an entry for every figure of `figures`.
    """

    key: str
    name: str
    driver_names: tuple[str, ...]
    aliases: tuple[str, ...]
    memory_bytes: int
    bandwidth_bytes_per_s: float
    num_sms: int
    l2_bytes: int
    compute_capability: tuple[int, int]
    fp32_flops: float
    torch_builds: tuple[str, ...]
    sources: Mapping[str, Source]
    boost_clock_hz: float | None = None
    flops_16bit: float | None = None
    fp16_flops: float | None = None
    tf32_flops: float | None = None
    fp8_flops: float | None = None
    tdp_w: float | None = None
    has_inline_ecc: bool = False
    power_limits_w: tuple[float, float] | None = None
    boost_clock_range_hz: tuple[float, float] | None = None
    bandwidth_range_bytes_per_s: tuple[float, float] | None = None
    visible_bytes: int | None = None
    measured_context_bytes: int | None = None
    launch_s: float | None = None
    pcie: str | None = None
    nvlink_bytes_per_s: float | None = None
    note: str | None = None
    is_local: bool = False

    @property
    def has_bf16(self) -> bool:
        """Older cards emulate bf16, slowly."""
        return self.compute_capability >= (8, 0)

    @property
    def flops_16bit_range(self) -> tuple[float, float] | None:
        """What a laptop's card reaches at its lowest and highest power limit: it grows with the clock."""
        if not (self.boost_clock_range_hz and self.boost_clock_hz and self.flops_16bit):
            return None
        low, high = self.boost_clock_range_hz
        return self.flops_16bit * low / self.boost_clock_hz, self.flops_16bit * high / self.boost_clock_hz


def usable_bytes(card: Card, host: CardHost) -> int:
    """Bytes that PyTorch's allocator may reserve on a card that nothing but `host` itself shares.

    On Windows more can be had, from system memory and about eight times as slow. WSL is as Windows: its ceiling
    lies below what the driver shows as free. A live reading of free memory, where there is one, is the better guide.
    """
    total = card.memory_bytes * (1 - _INLINE_ECC_SHARE if card.has_inline_ecc else 1)
    if host in ("windows", "wsl"):
        return int(total * _WINDOWS_SHARE)
    visible = total * (1 - _DRIVER_SHARE) if card.visible_bytes is None else card.visible_bytes
    headless = int(visible) - context_bytes(card, host)
    if host == "linux-headless":
        return headless
    if host == "linux-desktop":
        return headless - _DESKTOP_BYTES
    raise ValueError(f"host {host!r} is none of linux-headless, linux-desktop, windows, wsl")


def context_bytes(card: Card, host: CardHost) -> int:
    """Bytes that a CUDA context takes outside PyTorch's allocator: as measured, else as planned.

    No reports tell the hosts apart, so `host` changes nothing yet.
    """
    return _CONTEXT_BYTES if card.measured_context_bytes is None else card.measured_context_bytes


def workspace_bytes(card: Card) -> int:
    """Bytes of one cuBLAS workspace; training holds two, one for the thread of the backward pass."""
    return _LARGE_WORKSPACE_BYTES if card.compute_capability[0] in _LARGE_WORKSPACE_MAJORS else _WORKSPACE_BYTES


def pcie_bytes_per_s(card: Card) -> float | None:
    """Bytes per second that the card's slot carries each way at the most; None where the slot is not known."""
    if card.pcie is None:
        return None
    generation, lanes = card.pcie.split(" x")
    return _LANE_RATES[generation] / 8 * 128 / 130 * int(lanes)


def figures(card: Card) -> dict[str, Any]:
    """All that is known of a card, by name: stored figures, then derived ones; what is unknown is left out."""
    known = {name: getattr(card, name) for name in STORED}
    known["has_inline_ecc"] = card.has_inline_ecc or None
    known["has_bf16"] = card.has_bf16
    known["flops_16bit_range"] = card.flops_16bit_range
    known["torch_builds"] = card.torch_builds
    known["pcie_bytes_per_s"] = pcie_bytes_per_s(card)
    known["usable_linux_headless_bytes"] = usable_bytes(card, "linux-headless")
    known["usable_linux_desktop_bytes"] = usable_bytes(card, "linux-desktop")
    known["usable_windows_bytes"] = usable_bytes(card, "windows")
    known["context_bytes"] = context_bytes(card, "linux-headless")
    known["workspace_bytes"] = workspace_bytes(card)
    return {name: value for name, value in known.items() if value is not None}
