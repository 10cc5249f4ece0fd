"""One table of a TOML file to one card, with all its problems reported together."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from onecard.hardware.card import STORED, Card, Source, figures
from onecard.units import GIB, MIB

_POSITIVE = "a positive number"


@dataclass(frozen=True)
class Defaults:
    """What holds for every row: sources by their id, the source of each figure, capabilities in PyTorch's builds."""

    sources: Mapping[str, Source]
    source_of: Mapping[str, str]
    builds: Mapping[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class _Cell:
    is_valid: Callable[[Any], bool]
    wants: str
    is_required: bool = False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


def _is_capability(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d+\.\d", value) is not None


def _is_slot(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[345]\.0 x(1|2|4|8|16)", value) is not None


_NUMBER, _COUNT, _TEXT = (
    _Cell(_is_number, _POSITIVE),
    _Cell(_is_count, "a positive whole number"),
    _Cell(_is_text, "text"),
)
_RANGE = _Cell(_is_range, "two positive numbers, the smaller one first")
_TEXTS = _Cell(lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts")
_CELLS = {
    "name": _Cell(_is_text, "text", True),
    "driver_names": _Cell(_TEXTS.is_valid, _TEXTS.wants, True),
    "aliases": _TEXTS,
    "memory_gib": _Cell(_is_number, _POSITIVE, True),
    "visible_gib": _NUMBER,
    "has_inline_ecc": _Cell(lambda value: isinstance(value, bool), "true or false"),
    "bandwidth_bytes_per_s": _Cell(_is_number, _POSITIVE, True),
    "bandwidth_range_bytes_per_s": _RANGE,
    "num_sms": _Cell(_is_count, _COUNT.wants, True),
    "boost_clock_hz": _NUMBER,
    "boost_clock_range_hz": _RANGE,
    "l2_mib": _Cell(_is_number, _POSITIVE, True),
    "compute_capability": _Cell(_is_capability, 'text such as "8.6"', True),
    "fp32_flops": _Cell(_is_number, _POSITIVE, True),
    "flops_16bit": _NUMBER,
    "fp16_flops": _NUMBER,
    "tf32_flops": _NUMBER,
    "fp8_flops": _NUMBER,
    "tdp_w": _NUMBER,
    "power_limits_w": _RANGE,
    "measured_context_gib": _NUMBER,
    "launch_s": _NUMBER,
    "pcie": _Cell(_is_slot, 'text such as "4.0 x16": 3.0, 4.0 or 5.0, and 1, 2, 4, 8 or 16 lanes'),
    "nvlink_bytes_per_s": _NUMBER,
    "note": _TEXT,
    "sources": _Cell(lambda value: isinstance(value, dict), "a table of figures and their sources"),
}
# A row of a user's own says in two texts where its figures come from.
_LOCAL_CELLS = {name: cell for name, cell in _CELLS.items() if name != "sources"} | {
    "source": _Cell(_is_text, "text that says where the figures come from", True),
    "date": _Cell(lambda value: value is not None, "a date", True),
}
_UNIT_BYTES = {"_gib": GIB, "_mib": MIB}


def find_row_problems(row: Any, is_local: bool) -> list[str]:
    """Lists what is wrong with the table of one card, one sentence each."""
    if not isinstance(row, dict):
        return ["it must be a table of figures"]
    cells = _LOCAL_CELLS if is_local else _CELLS
    problems = [
        f"{name} is missing: give {cell.wants}" for name, cell in cells.items() if cell.is_required and name not in row
    ]
    for name, value in row.items():
        if name not in cells:
            near = get_close_matches(name, cells, n=1)
            problems.append(f"{name} is unknown" + (f": do you mean {near[0]}?" if near else ""))
        elif not cells[name].is_valid(value):
            problems.append(f"{name} is {value!r}, but must be {cells[name].wants}")
    return problems


def read_row(key: str, row: Mapping[str, Any], defaults: Defaults, is_local: bool) -> Card:
    """Builds a card from a table without problems."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        unit = name[-4:]
        if unit in _UNIT_BYTES:
            values[name.removesuffix(unit) + "_bytes"] = round(value * _UNIT_BYTES[unit])
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    named = values.pop("sources", {})
    source, date = values.pop("source", None), values.pop("date", None)
    capability = read_capability(values.pop("compute_capability"))
    rate = values.get("flops_16bit")
    if not is_local and rate and capability >= (8, 0):
        values["tf32_flops"] = rate / 2
    builds = tuple(build for build, inside in defaults.builds.items() if runs_on(capability, inside))
    values.setdefault("aliases", ())
    card = Card(key=key, compute_capability=capability, torch_builds=builds, sources={}, is_local=is_local, **values)
    own = Source(f"local:{key}", str(source), str(date))
    sources = {
        name: own if _is_own(name, card) else defaults.sources[named.get(name) or defaults.source_of[name]]
        for name in figures(card)
    }
    return replace(card, sources=sources)


def read_capability(text: str) -> tuple[int, int]:
    """`"8.6"` -> (8, 6)."""
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _is_own(figure: str, card: Card) -> bool:
    """Whether a local row itself gives the figure; the rest follows by the catalogue's rules."""
    if not card.is_local:
        return False
    if figure == "context_bytes":
        return card.measured_context_bytes is not None
    if figure == "usable_linux_headless_bytes":
        return card.visible_bytes is not None and card.measured_context_bytes is not None
    return figure in STORED


def runs_on(capability: tuple[int, int], inside: tuple[tuple[int, int], ...]) -> bool:
    """Whether a build with these capabilities runs: code runs on later minor versions of its major one, too (CUDA)."""
    return any(major == capability[0] and minor <= capability[1] for major, minor in inside)
