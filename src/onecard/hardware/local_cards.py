"""Rows of a user's own: read beside the catalogue, written by `onecard cards --measure`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onecard.errors import InputError
from onecard.hardware.card import Card
from onecard.hardware.card_row import find_row_problems, read_row
from onecard.hardware.catalogue import catalogue_defaults, shipped_cards

_HEAD = "# Cards of this machine. `onecard cards --measure` rewrites this file: comments are lost, rows are kept.\n"


def local_cards_file() -> Path:
    """Gives the file of local rows: $ONECARD_HOME/cards.toml, else ~/.config/onecard/cards.toml, on every platform."""
    return Path(os.environ.get("ONECARD_HOME") or "~/.config/onecard").expanduser().absolute() / "cards.toml"


def read_local_cards() -> tuple[Card, ...]:
    """Reads the local rows; without a file there are none.

    Raises:
        InputError: the file is no TOML, or rows in it cannot be used; all problems together.
    """
    file = local_cards_file()
    rows = _read_rows(file)
    shipped = {card.key for card in shipped_cards()}
    problems = [f"card {key}: {text}" for key, row in rows.items() for text in find_row_problems(row, True)]
    problems += [f"card {key} is in the catalogue: give the row another name" for key in rows if key in shipped]
    problems += [f"card {key}: write its name in small letters" for key in rows if key != key.lower()]
    if problems:
        raise InputError(_refuse(file, problems))
    return tuple(read_row(key, row, catalogue_defaults(), is_local=True) for key, row in rows.items())


def write_local_card(key: str, row: Mapping[str, Any]) -> Path:
    """Adds or replaces one local row, keeps the others, and returns the file.

    Raises:
        InputError: the file that is there cannot be read, so that writing would lose its rows.
    """
    file = local_cards_file()
    read_local_cards()
    rows = _read_rows(file) | {key: dict(row)}
    tables = [_HEAD, *(_table(name, content) for name, content in rows.items())]
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    beside.write_text("\n".join(tables), encoding="utf-8")
    beside.replace(file)
    return file


def _read_rows(file: Path) -> dict[str, Any]:
    import tomllib

    try:
        data = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        str(data)  # what cannot be written cannot be told of: a hexadecimal number has no limit of its own
    except FileNotFoundError:
        return {}
    except RecursionError as error:
        raise InputError(_refuse(file, ["it is nested too deeply"])) from error
    except ValueError as error:  # no TOML, no UTF-8, or a number of too many digits
        raise InputError(_refuse(file, [f"it is no TOML: {error}"])) from error
    others = [f"[{name}] is unknown: only [cards.NAME] is read" for name in data if name != "cards"]
    rows = data.get("cards", {})
    if others or not isinstance(rows, dict):
        raise InputError(_refuse(file, others or ["`cards` must hold tables: [cards.NAME]"]))
    return rows


def _refuse(file: Path, problems: list[str]) -> str:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return f"{file}, which holds the cards of this machine, cannot be used:\n{listed}\nMend it or delete it"


def _table(key: str, row: Mapping[str, Any]) -> str:
    # Between quotes TOML reads texts and lists of them as JSON does.
    lines = [
        f"{name} = {value.isoformat() if hasattr(value, 'isoformat') else json.dumps(value, ensure_ascii=False)}"
        for name, value in row.items()
    ]
    return "\n".join([f"[cards.{json.dumps(key, ensure_ascii=False)}]", *lines, ""])
