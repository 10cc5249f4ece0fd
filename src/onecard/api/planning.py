"""What training would do, and its data, before it is done."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from onecard.api.here import OnProgress, apply_its_device, probe_here
from onecard.errors import InputError
from onecard.spec import Alternative, CardGroup, Plan, Recipe
from onecard.spec.load import apply_device

if TYPE_CHECKING:
    from onecard.data import TrainingData
    from onecard.hardware import Machine
    from onecard.planner import FirstAnswer, OnWait, Target


def prepare(recipe: Recipe, *, progress: OnProgress | None = None) -> "TrainingData":
    """Builds tokenizer and token files of a recipe, or opens those of an earlier call; of chats, with their audit.

    `progress` gets a stage, bytes done and bytes in all (None where unknown); of `preparing chats`, rows, about.

    Raises:
        DataError: the text cannot be used; the message names file and place.
    """
    from onecard.run.inputs import fetch_base, prepare_inputs, settle_base, settle_length

    recipe = settle_base(apply_its_device(settle_length(recipe), probe_here()))
    return prepare_inputs(recipe, fetch_base(recipe, weights=False, progress=progress), progress)


def plan(
    recipe: Recipe,
    *,
    card: str | CardGroup | None = None,
    platform: str | None = None,
    progress: OnProgress | None = None,
    on_draft: Callable[[Plan], None] | None = None,
    refine: bool = True,
) -> Plan:
    """Decides everything that training would do, each with its reason, and predicts its memory and time.

    Without `card` the plan is for this machine, and the text is prepared for it. With one (`rtx-4060-laptop`; see
    `onecard cards`) it is for that card on `platform` (linux, linux-headless or windows), needs no GPU, and takes the
    text as it is: its size is estimated unless it has been prepared before. A `CardGroup` is for so many processes:
    memory is that of each card, time that of all of them together.

    Seconds for an eager plan, up to a minute for a compiled one that is new. Then `on_draft` gets the plan with the
    forecast of its eager step first (`forecast.is_refined` false); without `refine` that is the answer.

    Raises:
        InputError: something asked for cannot be honoured.
        DoesNotFitError: nothing that may be chosen fits the card; the message says what would.
    """
    from onecard.hardware import find_card

    group, name = _group_and_name(card)
    # First: what follows imports torch, and a slip of the hand is not to wait for that.
    row = None if name is None else find_card(name)
    if row is not None and recipe.device == "cpu":
        raise InputError(f"a plan for {row.name} cannot be one for device cpu: leave the card out, or the device")
    from onecard import planner
    from onecard.planner import FirstAnswer
    from onecard.run import inputs

    machine, recipe = probe_here(), inputs.settle_base(inputs.settle_length(recipe))
    first = FirstAnswer(on_draft or (lambda _: None), is_refined=refine)
    if row is None:
        if platform is not None:
            raise InputError(
                "--platform belongs to --card: without a card the plan is for this machine. Give one, or leave it out"
            )
        return _plan_here(recipe, machine, group, first, progress)
    target = planner.target_of_card(row, platform, group)
    recipe = apply_device(recipe, "cuda")
    planner.check_recipe(recipe, machine, target)
    return planner.make_plan(
        recipe, machine, planner.survey_facts(recipe, inputs.find_base_here(recipe)), target=target, first=first
    )


def _plan_here(
    recipe: Recipe,
    machine: "Machine",
    group: CardGroup | None,
    first: "FirstAnswer",
    progress: OnProgress | None,
) -> Plan:
    from onecard import planner
    from onecard.observe.sinks import check_targets
    from onecard.run import inputs

    process_bytes = planner.loaded_bytes()
    recipe = apply_its_device(recipe, machine)
    check_targets(recipe.report_to)
    planner.check_recipe(recipe, machine)
    base = inputs.fetch_base(recipe, weights=False, progress=progress)
    corpus = inputs.prepare_inputs(recipe, base, progress)
    target = planner.find_target(recipe.device, machine, group)
    return inputs.plan_inputs(recipe, machine, corpus, process_bytes, first, target)


def alternatives(
    plan: Plan,
    *,
    card: str | CardGroup | None = None,
    platform: str | None = None,
    refine: bool = False,
    on_wait: "OnWait | None" = None,
) -> Iterator[Alternative]:
    """Forecasts a plan for a GPU with one thing changed at a time, a row as soon as it is known.

    Without `card` that is the GPU, or the group of them, which the plan was made for: that of this machine, or one of
    the catalogue.

    Rows that have to be compiled, and were not before, hold the figures of their eager step (`is_refined` false). With
    `refine` each of them that may fit comes a second time after all others, with the same settings and the figures of
    its compiled step: half a minute a row, what matters most first. `on_wait` is told before each of these which rows
    are still to come, the next one first, and how many seconds all of them are expected to take. What was compiled is
    remembered, so a call that is stopped loses no row.

    Raises:
        InputError: the plan is for a CPU, or for a GPU that is neither here nor in the catalogue.
    """
    from onecard.planner import list_alternatives

    if plan.forecast is None or plan.device == "cpu":
        raise InputError("alternatives are forecast for GPUs: name a card, as in --card rtx-4060-laptop")
    group, name = (plan.forecast.group, None) if card is None else _group_and_name(card)
    target = _find_target(plan.device, name or plan.forecast.card, platform, group, is_given=name is not None)
    return list_alternatives(plan, target, (on_wait or (lambda *_: None)) if refine else None)


def _group_and_name(card: str | CardGroup | None) -> tuple[CardGroup | None, str | None]:
    return (card, card.card) if isinstance(card, CardGroup) else (None, card)


def _find_target(device: str, card: str, platform: str | None, group: CardGroup | None, *, is_given: bool) -> "Target":
    """The card of that name: unless it was given, the device of this machine where it is that card."""
    from onecard.hardware import find_card
    from onecard.planner import find_target, target_of_card

    if not is_given:
        try:
            target = find_target(device, probe_here(), group)
        except InputError:  # no such device here
            pass
        else:
            if target.name == card:
                return target
    return target_of_card(find_card(card), platform, group)
