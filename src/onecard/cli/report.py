"""`onecard report`."""

import json
from typing import Annotated

import typer

from onecard.cli.recipe_words import JsonOption


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or latest.")],
    lang: Annotated[str, typer.Option("--lang", help="en, zh, or auto: that of the system.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Writes what became of a run into one HTML file, report.html in its folder; also while it trains."""
    from onecard import api

    path = api.write_report(run, lang=lang)
    print(json.dumps({"report": str(path)}, ensure_ascii=False) if as_json else path)
