"""`onecard plan`."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onecard.cli.forecast_text import bar_lines, forecast_rows, plan_document
from onecard.cli.group_words import take_group
from onecard.cli.ladder_view import LadderView
from onecard.cli.plan_text import reason_rows, summary_rows
from onecard.cli.preparation import PreparationProgress
from onecard.cli.recipe_words import ConfigOption, JsonOption, RecipeWords, recipe_from_words
from onecard.cli.rows import print_folded, print_rows, width_of
from onecard.cli.side_by_side import SideBySide
from onecard.errors import EXIT_INTERRUPTED, DoesNotFitError, InputError

if TYPE_CHECKING:
    from onecard.hardware import Card
    from onecard.spec import CardGroup, Plan, Recipe

CardOption = Annotated[
    str | None,
    typer.Option("--card", help="Plan for this card instead of this machine; several, with commas, side by side."),
]
PlatformOption = Annotated[
    str | None, typer.Option("--platform", help="What the card is in: linux (a desktop), linux-headless, windows, wsl.")
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

    With --num_processes N it is for N of the cards, a process each: memory is that of each card, time that of all.
    --cards_per_machine, --link_gb_per_s and --network_gb_per_s say what joins them.

    A compiled step is forecast before compiling first; --no-refine leaves it at that. With --json, --refine-all waits
    for the compiled steps of the alternatives, too, which people see one by one.
    """
    given = words or []
    if explain is not None:
        _refuse_beside_explain(given, {"--config": config, "--card": card, "--platform": platform})
        _explain(explain, as_json=as_json)
        return
    cards = _find_cards(card)
    given, group = take_group(given)
    recipe = recipe_from_words([word for word in given if word not in (*_NO_REFINE, *_REFINE_ALL)], config, "plan")
    refine = not set(given).intersection(_NO_REFINE)
    refine_all = bool(set(given).intersection(_REFINE_ALL))
    try:
        if len(cards) > 1:
            several = SideBySide(recipe, cards, platform, refine, refine_all, group)
            several.print_document() if as_json else several.print_table()
            return
        key = cards[0].key if cards else None
        one = key if group is None else group.model_copy(update={"card": key})
        asked = _Asked(recipe, one, platform, refine, refine_all)
        _answer_as_json(asked) if as_json else _answer(asked)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _find_cards(names: str | None) -> "list[Card]":
    """Finds the cards that --card names, before anything is done that takes long."""
    if names is None:
        return []
    from onecard.hardware import find_card

    found = {card.key: card for name in names.split(",") if name.strip() for card in [find_card(name)]}
    if not found:
        raise InputError(
            f"--card {names!r} names no card: give one, as in --card rtx-4060-laptop (`onecard cards` lists them), or "
            "leave --card out to plan for this machine"
        )
    return list(found.values())


def _refuse_beside_explain(words: list[str], options: dict[str, object]) -> None:
    """Refuses what a plan that was made before cannot follow."""
    given = [*(word for word in words), *(f"{name} {value}" for name, value in options.items() if value is not None)]
    if given:
        raise InputError(
            f"--explain shows the plan of a run as it was made, so these would change nothing: {' '.join(given)}. "
            "Leave them out, or leave --explain out to make another plan"
        )


@dataclass(frozen=True)
class _Asked:
    """A recipe to plan for one card or so many of it.

    `refine` the plan and, where people look on or `refine_all` is given, the rest.
    """

    recipe: "Recipe"
    card: "str | CardGroup | None"
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
    _print_bars(made)
    if made.reasons:
        print()
        print_rows([("decision", "value", "reason"), *reason_rows(made)])


def _print_bars(made: "Plan") -> None:
    if lines := bar_lines(made, width_of(sys.stdout)):
        print("\n".join(["", *lines]))


def _print_first(draft: "Plan") -> None:
    """Shows a plan whose compiled step is not known yet: all of it, with the figures of the eager one."""
    _print_plan(draft)
    print()
    print_folded("These are the figures before compiling; those of the compiled step take up to a minute ...")
    sys.stdout.flush()


def _print_refined(made: "Plan") -> None:
    """Shows what was open in the first answer."""
    print("\ncompiled")
    print_rows(forecast_rows(made))
    _print_bars(made)


def _explain(folder: Path, *, as_json: bool) -> None:
    """Shows a saved plan; its alternatives are forecast now, before compiling, for training does not wait for them."""
    from onecard import api
    from onecard.run.folder import RunFolder

    run = RunFolder.open(folder)
    made = run.plan()
    view = LadderView(silent=as_json)
    if not as_json:
        _print_plan(made)
        if (outcome := run.outcome()) is not None:
            print()
            print_rows([("as planned?", outcome.describe())])
    problem: InputError | None = None
    try:
        if made.forecast is not None and made.device != "cpu":
            for row in api.alternatives(made):
                view.show(row)
    except InputError as error:
        problem = error
    except KeyboardInterrupt:
        view.print_stopped()
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print(json.dumps(plan_document(made, view.rows or made.alternatives)))
    elif problem is not None:
        print()
        print_folded(f"alternatives cannot be forecast here: {problem}")
