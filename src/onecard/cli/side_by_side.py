"""Several cards side by side: each as soon as it is known, compiled steps after all others."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

from onecard.cli.forecast_text import plan_document
from onecard.cli.ladder_view import LadderView
from onecard.cli.rows import print_folded, print_rows, width_of
from onecard.cli.status import StatusLine
from onecard.errors import EXIT_INTERRUPTED, DoesNotFitError
from onecard.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from onecard.hardware import Card
    from onecard.spec import CardGroup, Forecast, Plan, Recipe

_COLUMNS = ("card", "in", "", "memory", "micro-batches", "speed", "whole run", "step")
# Of those between place and step. Rows come one by one, so none can wait for a wider one.
_WIDTHS = (12, 46, 25, 15, 30)
_STEP_WIDTH = len("compiled, interpolated")


@dataclass
class SideBySide:
    """A recipe on several cards; with `refine` compiled plans by their compiled steps, too.

    With a `group` it is for so many of each card. With `refine_all` a document waits for the compiled steps of the
    alternatives, as well.
    """

    recipe: "Recipe"
    cards: "Sequence[Card]"
    platform: str | None
    refine: bool
    refine_all: bool
    group: "CardGroup | None" = None
    _plans: "dict[str, Plan]" = field(default_factory=dict)
    _problems: dict[str, DoesNotFitError] = field(default_factory=dict)

    def print_table(self) -> None:
        """Prints a row as soon as it is known; then, one by one, those of compiled steps.

        Raises:
            DoesNotFitError: it fits none of the cards.
        """
        status = StatusLine()
        width = width_of(sys.stdout)
        longest = max(len(_count(self.group) + card.name) for card in self.cards)
        widths = (longest, len(self._host), *_WIDTHS)
        is_table = width is None or width >= sum(widths) + 2 * len(widths) + _STEP_WIDTH
        if is_table:
            print(_in_columns(_COLUMNS, widths))
        try:
            for made in self._plan_all(status):
                status.close()
                row = card_row(made, self._host)
                print(_in_columns(row, widths)) if is_table else _print_block(row)
                sys.stdout.flush()
        except KeyboardInterrupt:
            status.close()
            self._print_stopped()
            raise typer.Exit(EXIT_INTERRUPTED) from None
        finally:
            status.close()
        if notes := card_notes(list(self._plans.values())):
            print()
            for note in notes:
                print_folded(note)
        self._raise_if_none_fits()

    def print_document(self) -> None:
        """Prints one document; one of the cards that are known where it is interrupted.

        Raises:
            DoesNotFitError: it fits none of the cards.
        """
        documents = []
        try:
            for _ in self._plan_all(StatusLine()):
                pass
            for card in self.cards:
                documents.append(self._document(card))
        except KeyboardInterrupt:
            missing = self.cards[len(documents) :]
            documents += [plan_document(self._plans[card.key]) for card in missing if card.key in self._plans]
            print(json.dumps({"cards": documents}), flush=True)
            self._print_stopped()
            raise typer.Exit(EXIT_INTERRUPTED) from None
        print(json.dumps({"cards": documents}))
        self._raise_if_none_fits()

    def _asked(self, card: "Card") -> "str | CardGroup":
        return card.key if self.group is None else self.group.model_copy(update={"card": card.key})

    @property
    def _host(self) -> str:
        return self.platform or "linux"

    def _plan_all(self, status: StatusLine) -> "Iterator[Plan]":
        for number, card in enumerate(self.cards, 1):
            status.tell(f"planning for {card.name}, {number} of {len(self.cards)}")
            yield self._plan(card, refine=False)
        waiting = [card for card in self.cards if self.refine and _is_open(self._plans[card.key].forecast)]
        for number, card in enumerate(waiting, 1):
            status.tell(f"compiling for {card.name}, {number} of {len(waiting)}, up to a minute each")
            yield self._plan(card, refine=True)

    def _plan(self, card: "Card", *, refine: bool) -> "Plan":
        """One on which nothing fits is a plan like the others."""
        from onecard import api

        self._problems.pop(card.key, None)
        try:
            made = api.plan(self.recipe, card=self._asked(card), platform=self.platform, refine=refine)
        except DoesNotFitError as error:
            if error.plan is None:
                raise
            made = error.plan
            self._problems[card.key] = error
        self._plans[card.key] = made
        return made

    def _document(self, card: "Card") -> dict[str, object]:
        from onecard import api

        made = self._plans[card.key]
        if card.key in self._problems:
            return plan_document(made, made.alternatives)
        ladder = LadderView(silent=True)
        refine = self.refine and self.refine_all
        asked = self._asked(card)
        for row in api.alternatives(made, card=asked, platform=self.platform, refine=refine, on_wait=ladder.on_wait):
            ladder.show(row)
        return plan_document(made, ladder.rows)

    def _print_stopped(self) -> None:
        plans = [(card, self._plans.get(card.key)) for card in self.cards]
        left = [card.name for card, made in plans if made is None or (self.refine and _is_open(made.forecast))]
        told = f"; still open: {', '.join(left)}" if left else ""
        print_folded(f"stopped{told}. What is known is remembered: the same command goes on from here", sys.stderr)

    def _raise_if_none_fits(self) -> None:
        if len(self._problems) == len(self.cards):
            raise next(iter(self._problems.values()))


def card_row(plan: "Plan", host: str) -> tuple[str, ...]:
    """One card of several: name, host, verdict, memory, micro-batches, speed, whole run, and what step it is of."""
    assert plan.forecast is not None
    memory, time = plan.forecast.memory, plan.forecast.time
    low, high = format_bytes(memory.peak_low_bytes), format_bytes(memory.peak_high_bytes)
    speed = whole = ""
    if time is not None:
        speed = f"{format_count(time.tokens_per_s)} tokens/s"
        bounds = [
            format_seconds(time.total_s * bound_s / time.step_s) for bound_s in (time.step_low_s, time.step_high_s)
        ]
        whole = f"{format_seconds(time.total_s)} ({' to '.join(bounds)})"
    strategy = f", {plan.strategy}" if plan.forecast.num_ranks > 1 else ""
    return (
        _count(plan.forecast.group) + plan.forecast.card,
        host,
        "fits" if memory.fits else "does not fit",
        f"{format_bytes(memory.peak_bytes)} ({low} to {high}) of {format_bytes(memory.limit_bytes)}",
        f"{plan.micro_batch_size} x {plan.num_micro_batches}{strategy}" + _recomputed(plan.gradient_checkpointing),
        speed,
        whole,
        _describe_step(plan, plan.forecast),
    )


def _count(group: "CardGroup | None") -> str:
    return "" if group is None else f"{group.num} x "


def card_notes(plans: "Sequence[Plan]") -> list[str]:
    """What the figures of several cards leave open, a line for each note and the cards it is about."""
    cards: dict[str, list[str]] = {}
    for plan in plans:
        for note in (plan_document(plan)["note"] or "").split("; "):
            if note:
                cards.setdefault(note, []).append(plan_document(plan)["card"])
    return [f"{', '.join(names)}: {note}" for note, names in cards.items()]


def _describe_step(plan: "Plan", forecast: "Forecast") -> str:
    if not plan.torch_compile:
        return "not compiled"
    if not forecast.is_refined:
        return "before compiling"
    return "compiled, interpolated" if forecast.is_interpolated else "compiled"


def _is_open(forecast: "Forecast | None") -> bool:
    """Whether compiling may tell something: not of what does not fit even with all that it may save."""
    return (
        forecast is not None
        and not forecast.is_refined
        and forecast.memory.peak_low_bytes <= forecast.memory.limit_bytes
    )


def _recomputed(share: float) -> str:
    if 0 < share < 1:
        return f", {share:.0%} recomputed"
    return ", recomputed" if share else ""


def _in_columns(cells: tuple[str, ...], widths: tuple[int, ...]) -> str:
    *others, last = cells
    return "  ".join([*(f"{cell:{width}}" for cell, width in zip(others, widths, strict=True)), last]).rstrip()


def _print_block(cells: tuple[str, ...]) -> None:
    """A card in a terminal that is too narrow for the table."""
    card, host, verdict, *rest, step = cells
    print_folded(f"{card} in {host}: {verdict}, {step}")
    print_rows([(f"  {name}", cell) for name, cell in zip(_COLUMNS[3:-1], rest, strict=True) if cell])
