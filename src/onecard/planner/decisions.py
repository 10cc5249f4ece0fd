"""What is decided before anything is measured: each decision by itself, all refusals together."""

from dataclasses import dataclass

from onecard.hardware import Machine
from onecard.planner.device import Target, choose_attention, choose_precision, find_target
from onecard.planner.optimizers import check_optimizer
from onecard.planner.pretrained import learn_control_tokens, plan_base
from onecard.planner.problems import Problems
from onecard.planner.requirements import (
    check_blocks,
    check_compiler,
    check_heldout,
    check_quantizing,
    check_ram,
)
from onecard.planner.schedule import BatchSizes, count_steps, make_schedule, resolve_batch
from onecard.planner.shape import count_adapters, plan_adapters, plan_model
from onecard.spec import AdaptPlan, CorpusFacts, ModelPlan, Recipe

_STEPS_OF_A_DRAFT = 1000


@dataclass(frozen=True)
class Grounds:
    """What decisions rest on. `recipe` is one whose device sections are applied; `corpus` None: not looked at yet."""

    recipe: Recipe
    machine: Machine
    target: Target
    corpus: CorpusFacts | None = None


def check_recipe(recipe: Recipe, machine: Machine, target: Target | None = None) -> None:
    """Refuses what cannot be honoured whatever the text holds, before time is spent on preparing it.

    `recipe` is one whose device sections are applied. Takes a fraction of a second.

    Raises:
        InputError: with all problems together.
        DoesNotFitError: the model alone is larger than the memory.
    """
    decide(Grounds(recipe, machine, target or find_target(recipe.device, machine)), {})


@dataclass(frozen=True)
class Decisions:
    """What is decided before anything is measured. `num_steps` is None where only hours are given."""

    precision: str
    attention: str
    model: ModelPlan
    adapt: AdaptPlan | None
    batch: BatchSizes
    num_steps: int | None


def decide(grounds: Grounds, reasons: dict[str, str]) -> Decisions:
    """Makes the decisions that do not depend on one another's success, and reports what all of them refuse.

    Without a corpus one of any length and with the smallest vocabulary stands in, so that nothing is refused for it.
    """
    recipe, target, corpus = grounds.recipe, grounds.target, grounds.corpus
    problems = Problems()
    reasons["device"] = target.reason
    precision, reasons["precision"] = problems.attempt(choose_precision, recipe, target, grounds.machine) or ("", "")
    adapt = problems.attempt(plan_adapters, recipe)
    model = problems.attempt(_plan_model, recipe, corpus, reasons)
    if model is not None and adapt is not None and corpus is not None:
        model = problems.attempt(learn_control_tokens, model, corpus, reasons)
    if model is not None and adapt is not None:
        problems.attempt(count_adapters, model, adapt)  # refuses names and ranks that the model has no place for
    attention, reasons["attn_implementation"] = problems.attempt(
        choose_attention, recipe, target, precision, model
    ) or ("", "")
    problems.attempt(check_compiler, recipe, target)
    problems.attempt(check_quantizing, recipe, target)
    problems.attempt(check_optimizer, recipe, target)
    batch = problems.attempt(resolve_batch, recipe, target.kind, reasons)
    num_steps = recipe.max_steps
    if batch is not None:
        num_steps = problems.attempt(count_steps, recipe, corpus, batch.total, reasons)
    problems.attempt(make_schedule, recipe, num_steps or draft_steps(recipe))
    if recipe.warmup_steps and recipe.warmup_ratio:
        reasons["schedule.num_warmup_steps"] = "warmup_steps; warmup_ratio beside it counts for nothing"
    if corpus is not None:
        problems.attempt(check_heldout, recipe, corpus)
        problems.attempt(check_blocks, recipe, corpus)
    problems.report(recipe)
    assert model is not None
    assert batch is not None
    if target.kind == "cpu":
        check_ram(recipe, model, grounds.machine)
    return Decisions(precision, attention, model, adapt, batch, num_steps)


def _plan_model(recipe: Recipe, corpus: CorpusFacts | None, reasons: dict[str, str]) -> ModelPlan:
    if recipe.model_name_or_path is None:
        return plan_model(recipe, corpus or _any_corpus(recipe), reasons)
    return plan_base(
        recipe.model_name_or_path,
        max_seq_length=recipe.max_seq_length,
        vocab_size=corpus.vocab_size if corpus else None,
        dropout=recipe.dropout,
        reasons=reasons,
    )


def _any_corpus(recipe: Recipe) -> CorpusFacts:
    return CorpusFacts(
        vocab_size=recipe.vocab_size or 1,
        num_train_tokens=1,
        num_heldout_tokens=1,
        train_bytes=1,
        heldout_bytes=1,
        separator_id=0,
        fingerprint="",
    )


def draft_steps(recipe: Recipe) -> int:
    """Stands for the number of steps until it is known how many the text has or the hours allow."""
    return max(_STEPS_OF_A_DRAFT, recipe.warmup_steps or 0)
