"""Recipe + machine + corpus -> Plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onecard.errors import InputError
from onecard.hardware import Machine
from onecard.planner.device import choose_attention, choose_device, choose_precision, find_compiler_problem, kind_of
from onecard.planner.measure import measure_peak, measure_step
from onecard.planner.schedule import count_steps, make_schedule, resolve_batch, resolve_interval
from onecard.planner.shape import attention_width, plan_model
from onecard.spec import CorpusFacts, OptimizerPlan, Plan, Recipe
from onecard.units import format_seconds

# torch.compile takes about 40 s on two CPU cores and gains 1.1 to 1.3 there (field notes); on a GPU it gains far more.
_COMPILE_PAYS_AFTER_S = {"cpu": 900.0, "cuda": 180.0}
# Share of a large matrix product's speed that an eager step reaches, to judge how long a run takes.
_EAGER_SHARE_OF_PEAK = 0.25
# Stands for the number of steps until it has been measured how many the hours allow.
_STEPS_OF_A_DRAFT = 1000
# What a plan takes over from the recipe as it is.
_KEPT = (
    *("max_seq_length", "max_hours", "seed", "deterministic", "dataloader_prefetch_factor"),
    *("eval_batches", "save_total_limit", "early_stopping_patience", "sample_prompts", "sample_max_new_tokens"),
)


@dataclass(frozen=True)
class Measurements:
    """How the planner learns about speed; tests give their own."""

    peak: Callable[[str, str], float] = measure_peak
    step: Callable[[Plan], float] = measure_step


def make_plan(recipe: Recipe, machine: Machine, corpus: CorpusFacts, measurements: Measurements | None = None) -> Plan:
    """Turns every `auto` into a number with a reason. `recipe` is one whose device sections are applied.

    Where only hours are given, a few steps are run to turn them into a number of steps.

    Raises:
        InputError: something asked for cannot be honoured on this machine or with this corpus.
    """
    measurements = measurements or Measurements()
    reasons: dict[str, str] = {}
    device, reasons["device"] = choose_device(recipe.device, machine)
    precision, reasons["precision"] = choose_precision(recipe, device, machine)
    model = plan_model(recipe, corpus, reasons)
    attention, reasons["attn_implementation"] = choose_attention(recipe, device, precision, model.dropout)
    batch = resolve_batch(recipe, kind_of(device), reasons)
    _check_corpus(recipe, corpus)
    tokens_per_step = batch.total * recipe.max_seq_length
    num_steps = count_steps(recipe, corpus, tokens_per_step, reasons)
    num_layers, width = attention_width(model.settings)
    flops_per_token = 6.0 * model.num_matrix_parameters + 6.0 * num_layers * width * recipe.max_seq_length
    peak_flops = measurements.peak(device, precision)
    step_s = flops_per_token * tokens_per_step / (peak_flops * _EAGER_SHARE_OF_PEAK)
    run_s = 3600 * recipe.max_hours if num_steps is None and recipe.max_hours else (num_steps or 1) * step_s
    compiled, reasons["torch_compile"] = _choose_compile(recipe, device, run_s)
    draft = Plan(
        device=device,
        precision=precision,  # type: ignore[arg-type]
        torch_compile=compiled,
        attn_implementation=attention,  # type: ignore[arg-type]
        gradient_checkpointing=recipe.gradient_checkpointing is True,
        model=model,
        optimizer=_optimizer(recipe),
        schedule=make_schedule(recipe, num_steps or max(_STEPS_OF_A_DRAFT, recipe.warmup_steps or 0)),
        corpus=corpus,
        micro_batch_size=batch.micro,
        total_batch_size=batch.total,
        eval_batch_size=batch.evaluation,
        dataloader_num_workers=1 if recipe.dataloader_num_workers == "auto" else recipe.dataloader_num_workers,
        dataset_num_proc=machine.num_cores if recipe.dataset_num_proc == "auto" else recipe.dataset_num_proc,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops,
        reasons=reasons,
        **_intervals(recipe, num_steps or _STEPS_OF_A_DRAFT),
        **{key: getattr(recipe, key) for key in _KEPT},
    )
    if recipe.max_hours is None:
        return draft
    return _fit_into_hours(draft, recipe, num_steps, measurements.step(draft))


def _fit_into_hours(draft: Plan, recipe: Recipe, num_steps: int | None, step_s: float) -> Plan:
    assert recipe.max_hours is not None
    affordable = max(1, int(3600 * recipe.max_hours / step_s))
    chosen = affordable if num_steps is None else min(num_steps, affordable)
    if num_steps is None or chosen < num_steps:
        draft.reasons["num_steps"] = f"{format_seconds(3600 * recipe.max_hours)} at {step_s:.3g} s per step, measured"
    return draft.model_copy(update={"schedule": make_schedule(recipe, chosen), **_intervals(recipe, chosen)})


def _intervals(recipe: Recipe, num_steps: int) -> dict[str, Any]:
    return {
        key: resolve_interval(getattr(recipe, key), num_steps) for key in ("eval_steps", "save_steps", "sample_steps")
    }


def _optimizer(recipe: Recipe) -> OptimizerPlan:
    keys = OptimizerPlan.model_fields.keys() - {"name"}
    return OptimizerPlan(name=recipe.optim, **{key: getattr(recipe, key) for key in keys})


def _choose_compile(recipe: Recipe, device: str, run_s: float) -> tuple[bool, str]:
    if recipe.torch_compile is False:
        return False, "asked for"
    if problem := find_compiler_problem(device):
        if recipe.torch_compile is True:
            raise InputError(
                f"torch_compile cannot be used: {problem}. Install it, or set torch_compile to auto or false"
            )
        return False, problem
    if recipe.torch_compile is True:
        return True, "asked for"
    threshold = _COMPILE_PAYS_AFTER_S[kind_of(device)]
    if run_s < threshold:
        return False, f"a run of about {format_seconds(run_s)} is over before compiling pays"
    return True, f"pays back within a run of about {format_seconds(run_s)}"


def _check_corpus(recipe: Recipe, corpus: CorpusFacts) -> None:
    if recipe.early_stopping_patience and not corpus.num_heldout_tokens:
        raise InputError("early_stopping_patience needs held-out text: set eval_fraction above 0, or eval_dataset")
    if corpus.num_train_tokens <= recipe.max_seq_length:
        raise InputError(
            f"the training text has {corpus.num_train_tokens} tokens, fewer than one block of max_seq_length "
            f"{recipe.max_seq_length}: give more text, or lower max_seq_length"
        )
