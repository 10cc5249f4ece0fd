"""The cards that come with onecard: catalogue.toml, read once."""

from functools import cache
from importlib.resources import files
from typing import Any

from onecard.hardware.card import Card, Source
from onecard.hardware.card_row import Defaults, find_row_problems, read_capability, read_row


@cache
def shipped_cards() -> tuple[Card, ...]:
    """Gives the cards that come with onecard, whatever this machine's local file says."""
    defaults = catalogue_defaults()
    return tuple(read_row(key, row, defaults, is_local=False) for key, row in _read_catalogue()["cards"].items())


@cache
def catalogue_defaults() -> Defaults:
    """Gives the catalogue's sources and PyTorch's builds, which hold for local rows too."""
    data = _read_catalogue()
    return Defaults(
        sources={
            key: Source(key, row["text"], row["date"].isoformat(), row.get("url"))
            for key, row in data["sources"].items()
        },
        source_of=data["figures"],
        builds={build: tuple(map(read_capability, inside)) for build, inside in data["torch_builds"].items()},
    )


@cache
def _read_catalogue() -> dict[str, Any]:
    import tomllib

    data = tomllib.loads(files("onecard.hardware").joinpath("catalogue.toml").read_text(encoding="utf-8"))
    problems = [f"{key}: {text}" for key, row in data["cards"].items() for text in find_row_problems(row, False)]
    if problems:
        raise ValueError("; ".join(problems))
    return data
