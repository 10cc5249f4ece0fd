"""`onecard train`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from onecard.cli.recipe_words import ConfigOption, JsonOption, RecipeWords, recipe_from_words
from onecard.cli.watching import watch
from onecard.errors import InputError


def train(
    words: RecipeWords = None,
    config: ConfigOption = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Run folder; by default runs/<recipe>-<time>.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            "--resume-from-checkpoint",
            help="Continue a run: its folder, one of its checkpoints, or latest.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Trains a model. Every key of a recipe is a flag: `onecard recipes --keys` lists them."""
    # `--resume_from_checkpoint True` and `False` are how transformers' scripts say it.
    run = {"true": "latest", "false": None}.get(resume.lower(), resume) if resume is not None else None
    if run == "":
        raise InputError("--resume needs a run folder, one of its checkpoints, or latest")
    if run is not None and not words and config is None:
        # A run knows its own recipe.
        from onecard import api

        watch(partial(api.resume, run), as_json=as_json)
        return
    recipe = recipe_from_words(words or [], config)
    from onecard import api

    watch(partial(api.train, recipe, output_dir=output_dir, resume=run), as_json=as_json)
