"""`onecard plan`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onecard.cli.forecast_text import alternative_row, bar_lines, card_notes, card_row, forecast_rows, plan_document
from onecard.cli.plan_text import reason_rows, summary_rows
from onecard.cli.preparation import PreparationProgress
from onecard.cli.recipe_words import ConfigOption, JsonOption, RecipeWords, recipe_from_words
from onecard.cli.rows import print_rows
from onecard.errors import DoesNotFitError

if TYPE_CHECKING:
    from onecard.spec import Plan, Recipe

CardOption = Annotated[
    str | None,
    typer.Option("--card", help="Plan for this card instead of this machine; several, with commas, side by side."),
]
PlatformOption = Annotated[
    str | None, typer.Option("--platform", help="What the card is in: linux (a desktop), linux-headless or windows.")
]
# Taken out of the words: a recipe's keys are flags, too.
_NO_REFINE = ("--no-refine", "--no_refine")
ExplainOption = Annotated[Path | None, typer.Option("--explain", help="Show the plan of this run again.")]


def plan(
    words: RecipeWords = None,
    config: ConfigOption = None,
    card: CardOption = None,
    platform: PlatformOption = None,
    explain: ExplainOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shows every decision of a run with its reason, its memory and its time on a card, without training.

    A compiled step is forecast before compiling first; --no-refine leaves it at that.
    """
    if explain is not None:
        _explain(explain, as_json=as_json)
        return
    refine = not set(words or []).intersection(_NO_REFINE)
    recipe = recipe_from_words([word for word in words or [] if word not in _NO_REFINE], config)
    cards = [name.strip() for name in card.split(",") if name.strip()] if card else []
    if len(cards) > 1:
        _compare(recipe, cards, platform, refine=refine, as_json=as_json)
        return
    _plan_one(recipe, cards[0] if cards else None, platform, refine=refine, as_json=as_json)


def _plan_one(recipe: "Recipe", card: str | None, platform: str | None, *, refine: bool, as_json: bool) -> None:
    from onecard import api

    has_first = refine and not as_json
    shown: list[Plan] = []

    def show(draft: "Plan") -> None:
        progress.close()
        _print_first(draft)
        shown.append(draft)

    try:
        with PreparationProgress(sys.stderr) as progress:
            made = api.plan(
                recipe,
                card=card,
                platform=platform,
                progress=progress,
                on_draft=show if has_first else None,
                refine=refine,
            )
    except DoesNotFitError as error:
        if as_json and error.plan is not None:
            print(json.dumps(plan_document(error.plan, error.plan.alternatives)))
        raise
    rows = api.alternatives(made, card=card, platform=platform) if made.forecast and made.device != "cpu" else iter(())
    if as_json:
        print(json.dumps(plan_document(made, rows)))
        return
    if shown:
        _print_refined(made)
    else:
        _print_plan(made)
    # Row by row as they are traced, after all that is known at once.
    for number, row in enumerate(rows):
        if number == 0:
            print("\nwhat else there is")
        changed, memory, time, verdict = alternative_row(row, made)
        print(f"  {changed:32}{memory:>9}  {time:14}  {verdict}".rstrip(), flush=True)


def _print_plan(made: "Plan") -> None:
    print_rows([*summary_rows(made), *forecast_rows(made)])
    if made.forecast is not None:
        print("\n".join(["", *bar_lines(made)]))
    if made.reasons:
        print()
        print_rows([("decision", "value", "reason"), *reason_rows(made)])


def _print_first(draft: "Plan") -> None:
    """Shows a plan whose compiled step is not known yet: all of it, with the figures of the eager one."""
    _print_plan(draft)
    print("\nThese are the figures before compiling; those of the compiled step take up to a minute ...", flush=True)


def _print_refined(made: "Plan") -> None:
    """Shows what was open in the first answer."""
    print("\ncompiled")
    print_rows(forecast_rows(made))
    print("\n".join(["", *bar_lines(made)]))


def _explain(folder: Path, *, as_json: bool) -> None:
    from onecard.run.folder import RunFolder

    made = RunFolder.open(folder).plan()
    if as_json:
        print(json.dumps(plan_document(made, made.alternatives)))
    else:
        _print_plan(made)


def _compare(recipe: "Recipe", cards: list[str], platform: str | None, *, refine: bool, as_json: bool) -> None:
    """Plans for several cards; one on which nothing fits is a row like the others, none is an error."""
    from onecard import api

    plans: list[Plan] = []
    problems: list[DoesNotFitError] = []
    for name in cards:
        try:
            plans.append(api.plan(recipe, card=name, platform=platform, refine=refine))
        except DoesNotFitError as error:
            if error.plan is None:
                raise
            problems.append(error)
            plans.append(error.plan)
    if as_json:
        print(json.dumps({"cards": [plan_document(made) for made in plans]}))
    else:
        rows = [card_row(made, platform or "linux") for made in plans]
        print_rows([("card", "in", "", "memory", "micro-batches", "speed", "whole run"), *rows])
        if notes := card_notes(plans):
            print("\n".join(["", *notes]))
    if len(problems) == len(plans):
        raise problems[0]
