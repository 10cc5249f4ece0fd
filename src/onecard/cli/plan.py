"""`onecard plan`."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onecard.cli.forecast_text import bar_lines, card_notes, card_row, forecast_rows, plan_document
from onecard.cli.ladder_view import LadderView
from onecard.cli.plan_text import reason_rows, summary_rows
from onecard.cli.preparation import PreparationProgress
from onecard.cli.recipe_words import ConfigOption, JsonOption, RecipeWords, recipe_from_words
from onecard.cli.rows import print_rows
from onecard.cli.watching import EXIT_INTERRUPTED
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
_REFINE_ALL = ("--refine-all", "--refine_all")
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

    A compiled step is forecast before compiling first; --no-refine leaves it at that. With --json, --refine-all waits
    for the compiled steps of the alternatives, too, which people see one by one.
    """
    if explain is not None:
        _explain(explain, as_json=as_json)
        return
    given = words or []
    recipe = recipe_from_words([word for word in given if word not in (*_NO_REFINE, *_REFINE_ALL)], config, "plan")
    refine = not set(given).intersection(_NO_REFINE)
    cards = [name.strip() for name in card.split(",") if name.strip()] if card else []
    try:
        if len(cards) > 1:
            _compare(recipe, cards, platform, refine=refine, as_json=as_json)
            return
        asked = _Asked(
            recipe, cards[0] if cards else None, platform, refine, bool(set(given).intersection(_REFINE_ALL))
        )
        _answer_as_json(asked) if as_json else _answer(asked)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None


@dataclass(frozen=True)
class _Asked:
    """A recipe to plan for one card; `refine` the plan and, where people look on or `refine_all` is given, the rest."""

    recipe: "Recipe"
    card: str | None
    platform: str | None
    refine: bool
    refine_all: bool

    def plan(self, on_draft: "Callable[[Plan], None]", progress: PreparationProgress) -> "Plan":
        from onecard import api

        return api.plan(
            self.recipe,
            card=self.card,
            platform=self.platform,
            progress=progress,
            on_draft=on_draft,
            refine=self.refine,
        )

    def climb(self, made: "Plan", view: LadderView, *, refine: bool) -> None:
        """Shows the alternatives of a plan, as far as they are forecast."""
        from onecard import api

        if made.forecast is None or made.device == "cpu":
            return
        rows = api.alternatives(
            made, card=self.card, platform=self.platform, refine=refine and self.refine, on_wait=view.on_wait
        )
        for row in rows:
            view.show(row)


def _answer(asked: _Asked) -> None:
    """Prints what is known as soon as it is: the plan, better figures of it, then the alternatives."""
    shown: list[Plan] = []

    def show(draft: "Plan") -> None:
        progress.close()
        if asked.refine:
            _print_first(draft)
            shown.append(draft)

    with PreparationProgress(sys.stderr) as progress:
        try:
            made = asked.plan(show, progress)
        except KeyboardInterrupt:
            if not shown:
                raise
            print("stopped; the figures above are those before compiling", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    if not shown:
        _print_plan(made)
    elif _without_forecast(shown[0]) == _without_forecast(made):
        _print_refined(made)
    else:
        print("\ncompiled, other settings are needed")
        _print_plan(made)
    view = LadderView()
    try:
        asked.climb(made, view, refine=True)
    except KeyboardInterrupt:
        view.print_stopped()
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        view.close()
    view.finish()


def _answer_as_json(asked: _Asked) -> None:
    """Prints one document; one of what is known where it is interrupted."""
    drafts: list[Plan] = []
    view = LadderView(silent=True)
    try:
        with PreparationProgress(sys.stderr) as progress:
            drafts.append(asked.plan(drafts.append, progress))
        asked.climb(drafts[-1], view, refine=asked.refine_all)
    except DoesNotFitError as error:
        if error.plan is not None:
            print(json.dumps(plan_document(error.plan, error.plan.alternatives)))
        raise
    except KeyboardInterrupt:
        if not drafts:
            raise
        print(json.dumps(plan_document(drafts[-1], view.rows)), flush=True)
        view.print_stopped()
        raise typer.Exit(EXIT_INTERRUPTED) from None
    print(json.dumps(plan_document(drafts[-1], view.rows)))


def _without_forecast(made: "Plan") -> "Plan":
    return made.model_copy(update={"forecast": None})


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
