"""Recipe + machine + corpus -> Plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from onecard.errors import InputError
from onecard.hardware import Machine
from onecard.planner.decisions import Grounds, decide, draft_steps
from onecard.planner.device import (
    Target,
    find_compiler_problem,
    find_target,
    keep_for_nccl,
    keep_reserve,
    offered_bytes,
)
from onecard.planner.eval_tasks import plan_tasks, with_cache
from onecard.planner.fit import FirstAnswer
from onecard.planner.host_memory import check_host
from onecard.planner.measure import measure_micro_batches, measure_peak, measure_step
from onecard.planner.micro_batch import Trial, try_micro_batches
from onecard.planner.parts import share_of
from onecard.planner.ranks import plan_for_ranks, recut
from onecard.planner.rests import stretched_s
from onecard.planner.schedule import (
    make_schedule,
    resolve_interval,
    tokens_per_step,
)
from onecard.planner.shape import attention_width, choose_loss_chunk
from onecard.planner.strategy import fit_ranks
from onecard.spec import AdaptPlan, CorpusFacts, ModelPlan, OptimizerPlan, Plan, Recipe
from onecard.units import GIB, format_seconds

# torch.compile takes about 40 s on two CPU cores and gains 1.1 to 1.3 there (field notes); on a GPU it gains far more.
_COMPILE_PAYS_AFTER_S = {"cpu": 900.0, "cuda": 180.0}
# Share of a large matrix product's speed that an eager step reaches, to judge how long a run takes.
_EAGER_SHARE_OF_PEAK = 0.25
# What a plan takes over from the recipe as it is.
_KEPT = (
    *("max_seq_length", "max_hours", "seed", "deterministic", "dataloader_prefetch_factor", "on_nonfinite"),
    *("max_power_share", "eval_batches", "save_minutes", "save_total_limit", "early_stopping_patience"),
    *("sample_prompts", "sample_max_new_tokens"),
)

_INTERVALS = ("eval_steps", "save_steps", "sample_steps")


@dataclass(frozen=True)
class Measurements:
    """How the planner learns about speed; tests give their own."""

    peak: Callable[[str, str], float] = measure_peak
    step: Callable[[Plan], float] = measure_step
    micro_batches: Trial = measure_micro_batches


def make_plan(
    recipe: Recipe,
    machine: Machine,
    corpus: CorpusFacts,
    measurements: Measurements | None = None,
    target: Target | None = None,
    first: FirstAnswer | None = None,
) -> Plan:
    """Turns every `auto` into a number with a reason. `recipe` is one whose device sections are applied.

    `target` is what the plan is for; by default the recipe's device on this machine. Where only hours are given, a few
    steps are run on it to turn them into a number of steps. `first` is told of a plan that has to be compiled.

    Raises:
        InputError: something asked for cannot be honoured on this machine or with this corpus.
    """
    measurements = measurements or Measurements()
    target = keep_for_nccl(keep_reserve(target or find_target(recipe.device, machine), recipe.reserve_gb))
    grounds = Grounds(recipe, machine, target, corpus)
    draft, num_steps = _draft(grounds, measurements)
    draft = plan_for_ranks(draft, recipe, target.num_ranks)
    if target.kind == "cuda":
        draft = fit_ranks(draft, recipe, target, first)
        if target.is_here and target.group is not None:
            check_host(draft, machine, target.group)
    elif recipe.per_device_train_batch_size == "auto" and recipe.gradient_accumulation_steps == "auto":
        run_s = _guess_run_s(recipe, num_steps, draft.flops_per_token * draft.tokens_per_step / draft.peak_flops)
        draft = recut(try_micro_batches(draft, machine, run_s, measurements.micro_batches), target.num_ranks)
    if recipe.max_hours is None or not target.is_here:
        return draft
    return _fit_into_hours(draft, recipe, num_steps, stretched_s(_measure_step(draft, target, measurements), draft))


def _draft(grounds: Grounds, measurements: Measurements) -> tuple[Plan, int | None]:
    """A whole plan, and the number of steps it is asked for; None where only hours are given."""
    recipe, target, corpus = grounds.recipe, grounds.target, grounds.corpus
    assert corpus is not None
    reasons: dict[str, str] = {}
    decided = decide(grounds, reasons)
    model, batch, num_steps = decided.model, decided.batch, decided.num_steps
    flops_per_token = _flops_per_token(model, decided.adapt, _attended_length(recipe, corpus))
    if target.is_here:
        peak_flops = measurements.peak(target.device, decided.precision)
    else:
        peak_flops = _peak_of_card(target, decided.precision)
    step_flops = flops_per_token * tokens_per_step(recipe, corpus, batch.total)
    run_s = _guess_run_s(recipe, num_steps, step_flops / peak_flops)
    compiled, reasons["torch_compile"] = _choose_compile(recipe, target, run_s, decided.attention)
    if (idle := _find_idle_limit(recipe, target)) is not None:
        reasons["memory_limit_bytes"] = idle
    reasons |= {key: "those of an epoch" for key in _INTERVALS if getattr(recipe, key) == "epoch"}
    draft = Plan(
        task=recipe.task,
        packing=_choose_packing(recipe, target, decided.attention, is_compiled=compiled),
        device=target.device,
        precision=decided.precision,  # type: ignore[arg-type]
        torch_compile=compiled,
        attn_implementation=decided.attention,  # type: ignore[arg-type]
        loss_chunk_size=choose_loss_chunk(recipe, model, target.kind, reasons),
        gradient_checkpointing=recipe.gradient_checkpointing != "auto" and recipe.gradient_checkpointing,
        model=model,
        adapt=decided.adapt,
        optimizer=_optimizer(recipe),
        schedule=make_schedule(recipe, num_steps or draft_steps(recipe)),
        corpus=corpus,
        micro_batch_size=batch.micro,
        total_batch_size=batch.total,
        eval_batch_size=batch.evaluation,
        dataloader_num_workers=1 if recipe.dataloader_num_workers == "auto" else recipe.dataloader_num_workers,
        dataset_num_proc=grounds.machine.num_cores if recipe.dataset_num_proc == "auto" else recipe.dataset_num_proc,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops,
        reasons=reasons,
        eval_tasks=with_cache(plan_tasks(recipe, target.kind, reasons), model.settings, decided.precision),
        num_threads=torch.get_num_threads() if target.kind == "cpu" else None,
        memory_limit_bytes=_memory_limit(recipe, target),
        **_intervals(
            recipe, num_steps or draft_steps(recipe), corpus.steps_per_epoch(batch.total, recipe.max_seq_length)
        ),
        **{key: getattr(recipe, key) for key in _KEPT},
    )
    return draft, num_steps


def _measure_step(draft: Plan, target: Target, measurements: Measurements) -> float:
    """Seconds of a step as it is computed here, of several ranks of what each does; and what it is expected to wait."""
    time = draft.forecast.time if draft.forecast else None
    waited_s = (time.exposed_communication_s or 0.0) if time else 0.0
    return measurements.step(share_of(draft, target.num_ranks)) + waited_s


def _guess_run_s(recipe: Recipe, num_steps: int | None, step_at_peak_s: float) -> float:
    """Seconds of a run, about; where only hours are given, those."""
    if num_steps is None and recipe.max_hours:
        return 3600 * recipe.max_hours
    return (num_steps or 1) * step_at_peak_s / _EAGER_SHARE_OF_PEAK


def _fit_into_hours(draft: Plan, recipe: Recipe, num_steps: int | None, step_s: float) -> Plan:
    assert recipe.max_hours is not None
    affordable = max(1, int(3600 * recipe.max_hours / step_s))
    chosen = affordable if num_steps is None else min(num_steps, affordable)
    allowed = format_seconds(3600 * recipe.max_hours)
    asked_for = draft.reasons.get("schedule.num_steps", f"{num_steps} steps")
    rests = "" if draft.max_power_share is None else ", with its rests"
    if num_steps is None:
        draft.reasons["schedule.num_steps"] = f"{allowed} at {step_s:.3g} s per step, measured{rests}"
    elif chosen < num_steps:
        draft.reasons["schedule.num_steps"] = (
            f"{allowed} at {step_s:.3g} s per step, measured{rests}, are over before {asked_for} ({num_steps} steps)"
        )
    else:
        draft.reasons["schedule.num_steps"] = (
            f"{asked_for}, over before {allowed} at {step_s:.3g} s per step, measured{rests}"
        )
    return draft.model_copy(
        update={"schedule": make_schedule(recipe, chosen), **_intervals(recipe, chosen, draft.steps_per_epoch)}
    )


def _attended_length(recipe: Recipe, corpus: CorpusFacts) -> int:
    """Tokens that see one another: a block of text, or a chat of mean length."""
    if not corpus.num_train_rows:
        return recipe.max_seq_length
    return min(recipe.max_seq_length, max(1, round(corpus.num_train_tokens / corpus.num_train_rows)))


def _flops_per_token(model: ModelPlan, adapt: AdaptPlan | None, length: int) -> float:
    """Frozen matrices take part in the backward pass once, on the way to the layers before them."""
    num_layers, width = attention_width(model.settings)
    per_parameter = 6.0 if adapt is None else 4.0
    return per_parameter * model.num_matrix_parameters + 6.0 * num_layers * width * length


def _choose_packing(
    recipe: Recipe, target: Target, attention: str, *, is_compiled: bool
) -> Literal["off", "rows", "flat"]:
    """A CPU takes rows of any length, one after the other; a compiled step and a GPU want few shapes.

    Eager attention holds the scores of a whole row.
    """
    if recipe.task == "pretrain" or not recipe.packing or attention == "apart":
        return "off"
    return "flat" if target.kind == "cpu" and not is_compiled and attention != "eager" else "rows"


def _intervals(recipe: Recipe, num_steps: int, steps_per_epoch: int) -> dict[str, Any]:
    return {key: resolve_interval(getattr(recipe, key), num_steps, steps_per_epoch) for key in _INTERVALS}


def _optimizer(recipe: Recipe) -> OptimizerPlan:
    keys = OptimizerPlan.model_fields.keys() - {"name"}
    return OptimizerPlan(name=recipe.optim, **{key: getattr(recipe, key) for key in keys})


def _peak_of_card(target: Target, precision: str) -> float:
    assert target.card is not None
    half = target.card.fp16_flops if precision == "fp16" else None
    return (
        (half or target.card.flops_16bit or target.card.fp32_flops) if precision != "fp32" else target.card.fp32_flops
    )


def _memory_limit(recipe: Recipe, target: Target) -> int | None:
    """What the allocator may reserve: the least of what card, recipe and environment allow; None on a CPU."""
    offered = offered_bytes(target)
    if offered is None or recipe.memory_limit_gb is None:
        return offered
    return min(offered, int(recipe.memory_limit_gb * GIB))


def _find_idle_limit(recipe: Recipe, target: Target) -> str | None:
    """Says why memory_limit_gb or reserve_gb changes nothing, where it does not."""
    if recipe.reserve_gb is not None and target.kind == "cpu":
        return "reserve_gb is for GPUs: on a CPU it changes nothing"
    if recipe.memory_limit_gb is None:
        return None
    offered = _memory_limit(recipe.model_copy(update={"memory_limit_gb": None}), target)
    if offered is None:
        return "memory_limit_gb is for GPUs: on a CPU it changes nothing"
    if recipe.memory_limit_gb * GIB <= offered:
        return None
    return f"memory_limit_gb {recipe.memory_limit_gb:.4g} changes nothing: it is more than can be had"


def _choose_compile(recipe: Recipe, target: Target, run_s: float, attention: str) -> tuple[bool, str]:
    if attention == "apart" and recipe.task == "pretrain":
        if recipe.torch_compile is True:
            raise InputError(
                "torch_compile: documents of any length run one at a time, each a shape to compile: use auto"
            )
        return False, "documents of any length run one at a time, each a shape to compile"
    if recipe.torch_compile != "auto":
        return recipe.torch_compile, "asked for"
    if attention == "apart":
        return False, "its own code counts positions or goes from token to token in Python, which compiles for long"
    if problem := find_compiler_problem(target):
        return False, problem
    threshold = _COMPILE_PAYS_AFTER_S[target.kind]
    if run_s < threshold:
        return False, "the run is over before compiling pays"
    # Without its length: the forecast has a better one.
    return True, "pays back within the run"
