"""`onecard cards`."""

import json
from typing import Annotated

import typer

from onecard.cli.recipe_words import JsonOption
from onecard.cli.rows import print_rows
from onecard.errors import InputError


def cards(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show every figure of this card.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the card in this machine and keep the result as a local row.")
    ] = False,
    contribute: Annotated[
        bool, typer.Option("--contribute", help="Print what runs on this machine took beside their plans, to share.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Lists what cards can do: memory and the usable part of it, speed, PyTorch builds; NAME shows each source."""
    from onecard.cli.cards_text import card_lines, cards_document, cards_rows, table_notes
    from onecard.hardware import all_cards, find_card

    if contribute:
        _print_outcomes(name)
        return
    if measure and name is not None:
        raise InputError(f"--measure times the card in this machine and takes no name, but there is {name!r}")
    if measure:
        shown = [find_card(_measure())]
    elif name is not None:
        shown = [find_card(name)]
    else:
        shown = list(all_cards())
    if as_json:
        print(json.dumps(cards_document(shown), ensure_ascii=False))
    elif measure or name is not None:
        print("\n".join(card_lines(shown[0])))
    else:
        print_rows(cards_rows(shown))
        print("\n".join(["", *table_notes()]))


def _print_outcomes(name: str | None) -> None:
    """One JSON object per run, which holds settings and figures and nothing of the text or the machine's paths."""
    from dataclasses import asdict

    from onecard.hardware import find_card
    from onecard.planner.outcomes import outcomes_file, outcomes_of

    rows = outcomes_of(find_card(name).key if name else None)
    if not rows:
        raise InputError(f"no run on a known card has been finished here yet: {outcomes_file()} holds no rows")
    for row in rows:
        print(json.dumps(asdict(row), ensure_ascii=False))


def _measure() -> str:
    """Writes the row of the card that is present, and gives its name."""
    from onecard.diagnose.measure_card import measure_present_card
    from onecard.hardware import probe_machine
    from onecard.hardware.local_cards import read_local_cards, write_local_card

    read_local_cards()  # a damaged file is to be known before the work
    key, row = measure_present_card(probe_machine(), lambda what: typer.echo(f"timing {what}", err=True))
    typer.echo(f"written to {write_local_card(key, row)}", err=True)
    return key
