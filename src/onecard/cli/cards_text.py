"""Cards as a table, as a page of figures, as JSON."""

from collections.abc import Callable, Sequence
from typing import Any

from onecard.hardware import Card, Source
from onecard.hardware.card import figures
from onecard.units import GIB, MIB

_HEADER = ("card", "GiB", "headless", "desktop", "Windows", "GB/s", "16-bit", "fp32", "bf16", "PyTorch")


def cards_rows(cards: Sequence[Card]) -> list[tuple[str, ...]]:
    """One row per card, below 100 columns."""
    return [_HEADER, *(_row(card) for card in cards)]


def table_notes() -> list[str]:
    """What the columns of the table mean."""
    return [
        "headless, desktop (both Linux), Windows: GiB that training may reserve. GB/s: memory bandwidth.",
        "16-bit, fp32: dense TFLOP/s, summed in fp32; of laptops from the lowest to the highest power limit.",
        "PyTorch: the CUDA builds that contain the card. Local rows hold what was measured, not peaks.",
        "`onecard cards NAME` shows every figure with its source.",
    ]


def card_lines(card: Card) -> list[str]:
    """Every figure of one card with the number of its source, then the sources."""
    values = figures(card)
    known = {name: values[name] for name in _LABELS if name in values}
    sources = list(dict.fromkeys(card.sources[name] for name in known))
    numbers = {source: f"[{number}]" for number, source in enumerate(sources, 1)}
    rows = [(_LABELS[name][0], _LABELS[name][1](value), numbers[card.sources[name]]) for name, value in known.items()]
    widths = [max(len(row[column]) for row in rows) + 2 for column in (0, 1)]
    lines = [f"{card.key}: {card.name}{' (a local row)' if card.is_local else ''}"]
    lines.append(f"driver's name: {', '.join(card.driver_names)}")
    lines += [f"also found as: {', '.join(card.aliases)}"] if card.aliases else []
    lines += ["", *(f"{label:<{widths[0]}}{value:<{widths[1]}}{number}" for label, value, number in rows)]
    lines += ["", card.note] if card.note else []
    return [*lines, "", *(f"{numbers[source]} {_cite(source)}" for source in sources)]


def cards_document(cards: Sequence[Card]) -> dict[str, Any]:
    """All figures for programs: bytes, bytes/s, FLOP/s, Hz, seconds, watts; each with the id of its source."""
    used = {source.id: source for card in cards for source in card.sources.values()}
    return {
        "cards": {card.key: _card_document(card) for card in cards},
        "sources": {key: {"text": source.text, "date": source.date, "url": source.url} for key, source in used.items()},
    }


def _card_document(card: Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "is_local": card.is_local,
        "driver_names": card.driver_names,
        "aliases": card.aliases,
        "note": card.note,
        "figures": {
            name: {
                "value": _capability(value) if name == "compute_capability" else value,
                "source": card.sources[name].id,
            }
            for name, value in figures(card).items()
        },
    }


def _row(card: Card) -> tuple[str, ...]:
    known = figures(card)
    usable = (known[f"usable_{host}_bytes"] / GIB for host in ("linux_headless", "linux_desktop", "windows"))
    rate = (
        _range(known["flops_16bit_range"], _tera) if "flops_16bit_range" in known else _tera(known.get("flops_16bit"))
    )
    return (
        card.key,
        f"{card.memory_bytes / GIB:5.4g}",
        *(f"{number:5.1f}" for number in usable),
        f"{card.bandwidth_bytes_per_s / 1e9:4.0f}",
        f"{rate:>9}",
        f"{_tera(card.fp32_flops):>5}",
        "yes" if card.has_bf16 else "no",
        "/".join(card.torch_builds).replace("/cu", "/") or "none",
    )


def _cite(source: Source) -> str:
    return f"{source.text} ({source.date}){f' {source.url}' if source.url else ''}"


def _tera(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate / 1e12:.0f}" if rate >= 1e15 else f"{rate / 1e12:.1f}"


def _capability(value: tuple[int, int]) -> str:
    return ".".join(map(str, value))


def _range(value: tuple[float, float], show: Callable[[float], str]) -> str:
    return f"{show(value[0])}-{show(value[1])}"


def _gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


def _mib(value: float) -> str:
    return f"{value / MIB:g} MiB"


def _flops(value: float) -> str:
    return f"{_tera(value)} TFLOP/s"


def _text(unit: str, scale: float = 1) -> Callable[[Any], str]:
    return lambda value: f"{value / scale:.4g} {unit}".rstrip()


def _ranged(unit: str, scale: float = 1, digits: int = 0) -> Callable[[Any], str]:
    return lambda value: f"{_range(value, lambda number: f'{number / scale:.{digits}f}')} {unit}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


_LABELS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "memory_bytes": ("memory", _gib),
    "visible_bytes": ("memory that CUDA shows", _gib),
    "has_inline_ecc": ("error correction takes 1/16 of it", _yes),
    "usable_linux_headless_bytes": ("usable on Linux, headless", _gib),
    "usable_linux_desktop_bytes": ("usable on a Linux desktop", _gib),
    "usable_windows_bytes": ("usable on Windows", _gib),
    "context_bytes": ("CUDA context", _gib),
    "workspace_bytes": ("one cuBLAS workspace", lambda value: f"{value / MIB:.2f} MiB"),
    "bandwidth_bytes_per_s": ("memory bandwidth", _text("GB/s", 1e9)),
    "bandwidth_range_bytes_per_s": ("bandwidth by version", _ranged("GB/s", 1e9)),
    "flops_16bit": ("16 bit, dense", _flops),
    "flops_16bit_range": ("16 bit by power limit", _ranged("TFLOP/s", 1e12, 1)),
    "fp16_flops": ("fp16 alone", _flops),
    "tf32_flops": ("tf32, dense", _flops),
    "fp32_flops": ("fp32", _flops),
    "fp8_flops": ("fp8, dense", _flops),
    "has_bf16": ("computes bf16", _yes),
    "pcie": ("PCIe", str),
    "pcie_bytes_per_s": ("PCIe, each way", _text("GB/s", 1e9)),
    "nvlink_bytes_per_s": ("NVLink, each way", _text("GB/s", 1e9)),
    "num_sms": ("SMs", str),
    "boost_clock_hz": ("boost clock", _text("MHz", 1e6)),
    "boost_clock_range_hz": ("boost clock by power limit", _ranged("MHz", 1e6)),
    "l2_bytes": ("L2 cache", _mib),
    "compute_capability": ("compute capability", _capability),
    "torch_builds": ("PyTorch builds", lambda value: " ".join(value) or "none"),
    "tdp_w": ("board power", _text("W")),
    "power_limits_w": ("power limit, by laptop", _ranged("W")),
    "launch_s": ("launch of one kernel", _text("µs", 1e-6)),
}
