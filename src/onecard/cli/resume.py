"""`onecard resume`."""

import json
from functools import partial
from typing import Annotated

import typer

from onecard.cli.preparation import PreparationProgress
from onecard.cli.recipe_words import JsonOption
from onecard.cli.watching import watch


def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, one of its checkpoints, or latest.")],
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", help="What may have changed since: data, tokenizer, recipe, card; several by commas."),
    ] = None,
    verify: Annotated[
        int | None,
        typer.Option("--verify", min=1, help="Repeat so many steps and compare them with the record; writes nothing."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Continues a run from where it stood."""
    from onecard import api

    if verify is not None:
        _verify(run, verify, as_json=as_json)
        return
    watch(partial(api.resume, run, accept=accept or ()), as_json=as_json)


def _verify(run: str, num_steps: int, *, as_json: bool) -> None:
    import sys

    from onecard import api

    progress = PreparationProgress(sys.stderr)
    try:
        found = api.verify(run, num_steps, on_progress=progress)
    finally:
        progress.close()
    print(json.dumps(found.to_document()) if as_json else found.describe())
    if not found.is_same:
        raise typer.Exit(1)
