"""`onecard find-lr`."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onecard.cli.preparation import PreparationProgress
from onecard.cli.recipe_words import ConfigOption, JsonOption, RecipeWords, recipe_from_words, source_from_words
from onecard.units import format_count, format_seconds

if TYPE_CHECKING:
    from onecard.trials.rates import Budget
    from onecard.trials.short_runs import Trial

MinutesOption = Annotated[
    float, typer.Option("--minutes", help="How long the search may take; longer runs, a surer answer.")
]
FolderOption = Annotated[
    Path | None, typer.Option("--output-dir", help="Folder of the evidence; by default find-lr/<recipe>-<time>.")
]


def find_lr(
    words: RecipeWords = None,
    config: ConfigOption = None,
    minutes: MinutesOption = 10.0,
    output_dir: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Proposes a learning rate for a recipe, from short whole runs over a range of rates.

    Text, batch, optimizer and the shape of the schedule are the recipe's; only the number of steps is smaller.
    """
    given = words or []
    recipe = recipe_from_words(given, config, "find-lr")
    from onecard import api
    from onecard.cli.rate_text import print_search, search_document, train_command
    from onecard.errors import EXIT_INTERRUPTED

    try:
        with PreparationProgress(sys.stderr) as progress:
            search, folder = api.find_lr(
                recipe,
                minutes=minutes,
                output_dir=output_dir,
                on_budget=partial(_tell_budget, progress),
                on_trial=_tell_trial,
                on_progress=progress,
            )
    except KeyboardInterrupt:  # before the first run
        print("stopped", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    command = train_command(search, *source_from_words(given, config))
    document = search_document(search, folder, command)
    api.keep_result(folder, document)
    if as_json:
        print(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        print_search(search, folder, command)
    if search.was_stopped:
        raise typer.Exit(EXIT_INTERRUPTED)


def _tell_budget(progress: PreparationProgress, budget: "Budget") -> None:
    progress.close()
    of = f" of {budget.of_steps}" if budget.num_steps < budget.of_steps else ""
    lengths = " and ".join(map(str, budget.lengths))
    text = (
        f"about {format_seconds(budget.search_s)} for some runs of {lengths} steps{of}, compared on the same "
        f"{format_count(budget.num_heldout_tokens)} held-out tokens; loss before training {budget.start_loss:.4f}"
    )
    print(text, file=sys.stderr, flush=True)


def _tell_trial(trial: "Trial") -> None:
    found = trial.stopped if trial.heldout_loss is None else f"held-out loss {trial.heldout_loss:.4f}"
    octaves = math.log2(trial.factor)
    text = f"x {trial.factor:<6.3g} ({octaves:+.1f} octaves), {trial.num_steps} steps, seed {trial.seed}: {found}"
    print(f"{text} ({format_seconds(trial.seconds)})", file=sys.stderr, flush=True)
