"""`onecard resume`."""

from functools import partial
from typing import Annotated

import typer

from onecard.cli.recipe_words import JsonOption
from onecard.cli.watching import watch


def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, one of its checkpoints, or latest.")],
    as_json: JsonOption = False,
) -> None:
    """Continues a run from where it stood."""
    from onecard import api

    watch(partial(api.resume, run), as_json=as_json)
