"""`onecard compare`."""

import json
from typing import Annotated

import typer

from onecard.cli.recipe_words import JsonOption

RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN RUN ...", help="Run folders, or a pattern: 'runs/*'.")]


def compare(
    runs: RunsArgument,
    over: Annotated[str, typer.Option(help="Axis of the curves: tokens, steps or time.")] = "tokens",
    curve: Annotated[
        str | None, typer.Option(help="heldout or train; by default held-out where there is such a one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Sets runs side by side: settings that differ, losses, scores, speed, curves; also while they train."""
    from onecard import api
    from onecard.cli.comparison_text import comparison_document, print_comparison

    comparison = api.compare(runs, over=over, curve=curve)
    if as_json:
        print(json.dumps(comparison_document(comparison), ensure_ascii=False, allow_nan=False))
    else:
        print_comparison(comparison)
