"""`onecard plan`."""

import sys

from onecard.cli.plan_text import reason_rows, summary_rows
from onecard.cli.preparation import PreparationProgress
from onecard.cli.recipe_words import ConfigOption, JsonOption, RecipeWords, recipe_from_words
from onecard.cli.rows import print_rows


def plan(words: RecipeWords = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Shows every decision of a run, with its reason, without training."""
    recipe = recipe_from_words(words or [], config)
    from onecard import api

    with PreparationProgress(sys.stderr) as progress:
        made = api.plan(recipe, progress=progress)
    if as_json:
        print(made.model_dump_json())
        return
    print_rows(summary_rows(made))
    if made.reasons:
        print()
        print_rows([("decision", "value", "reason"), *reason_rows(made)])
