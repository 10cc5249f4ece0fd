"""Settings that contradict each other, or would do nothing beside another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onecard.spec.tasks import ADAPTER_KEYS

if TYPE_CHECKING:
    from onecard.spec.recipe import Recipe

# Keys of which a recipe may hold one; giving another in a later layer replaces it.
DURATION_KEYS = ("max_steps", "num_train_epochs", "max_tokens")
# Files of transformers have both, of which the steps count unless they are 0.
WARMUP_KEYS = ("warmup_steps", "warmup_ratio")
TOTAL_BATCH_KEYS = ("total_batch_size", "total_batch_tokens")
# Keys that say the same as an entry of model_config.
SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Dependence:
    """Keys that count only under a condition.

    A recipe that sets them otherwise is refused, but a later layer that ends the condition by one of `switches`
    removes them from earlier ones: `--optim adamw` works on a recipe with `muon_momentum`.
    """

    keys: tuple[str, ...]
    switches: tuple[str, ...]
    holds: Callable[[Mapping[str, Any]], bool]
    needs: str


DEPENDENCES = (
    Dependence(("muon_learning_rate", "muon_momentum"), ("optim",), lambda v: v["optim"] == "muon", "optim muon"),
    Dependence(
        ("decay_ratio",), ("lr_scheduler_type",), lambda v: v["lr_scheduler_type"] == "wsd", "lr_scheduler_type wsd"
    ),
    Dependence(
        ("min_lr_ratio", "min_lr"),
        ("lr_scheduler_type",),
        lambda v: v["lr_scheduler_type"] != "constant",
        "an lr_scheduler_type other than constant",
    ),
    Dependence(("vocab_size",), ("tokenizer",), lambda v: v["tokenizer"] not in ("char", "bytes"), "tokenizer bpe"),
    Dependence(
        (*SHAPE_KEYS, "init", "vocab_size"),
        ("model_name_or_path",),
        lambda v: v["model_name_or_path"] is None,
        "a model from scratch, without model_name_or_path",
    ),
    Dependence(ADAPTER_KEYS, ("method",), lambda v: v["method"] != "full", "method lora or qlora"),
    Dependence(("double_quant",), ("method",), lambda v: v["method"] == "qlora", "method qlora"),
    Dependence(
        ("chat_template", "max_rounds", "packing", "on_bad_row"), ("task",), lambda v: v["task"] == "sft", "task sft"
    ),
    Dependence(("eval_split",), ("task",), lambda v: v["task"] != "sft", "task pretrain: chats are held out whole"),
    Dependence(
        ("eval_fraction",),
        ("eval_dataset",),
        # 0 is what eval_dataset makes of it anyway.
        lambda v: not v["eval_dataset"] or v["eval_fraction"] == 0,
        "a recipe without eval_dataset",
    ),
    Dependence(
        ("eval_split",),
        ("eval_dataset", "eval_fraction"),
        lambda v: not v["eval_dataset"] and v["eval_fraction"] > 0,
        "eval_fraction above 0 and no eval_dataset",
    ),
    Dependence(
        ("early_stopping_patience", "eval_batches"),
        ("eval_dataset", "eval_fraction"),
        lambda v: bool(v["eval_dataset"]) or v["eval_fraction"] > 0,
        "held-out text: eval_fraction above 0, or eval_dataset",
    ),
    Dependence(
        ("dataloader_prefetch_factor",),
        ("dataloader_num_workers",),
        lambda v: v["dataloader_num_workers"] != 0,
        "dataloader_num_workers above 0",
    ),
    Dependence(("eval_limit", "eval_max_new_tokens"), ("eval_tasks",), lambda v: bool(v["eval_tasks"]), "eval_tasks"),
    Dependence(("ifeval_data",), ("eval_tasks",), lambda v: "ifeval" in v["eval_tasks"], "eval_tasks ifeval"),
    Dependence(("sample_max_new_tokens",), ("sample_prompts",), lambda v: bool(v["sample_prompts"]), "sample_prompts"),
)


# File systems take 255 bytes: up to four per character, and the time of the run beside them.
_LONGEST_NAME = 56


def find_disagreements(recipe: "Recipe") -> list[str]:
    """Lists what speaks against a recipe whose values are each valid by themselves, one sentence each."""
    return [problem for check in _CHECKS if (problem := check(recipe))] + _find_idle(recipe)


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _find_idle(recipe: "Recipe") -> list[str]:
    values = vars(recipe)
    fields = type(recipe).model_fields
    return [
        f"{key} {_show(values[key])} has no effect: it needs {dependence.needs}; change that, or leave {key} out"
        for dependence in DEPENDENCES
        if not dependence.holds(values)
        for key in dependence.keys
        if key in fields and values[key] != fields[key].default
    ]


def _one_of(recipe: "Recipe", keys: tuple[str, ...]) -> str | None:
    given = [key for key in keys if getattr(recipe, key) is not None]
    if len(given) > 1:
        return f"{' and '.join(given)} contradict each other: keep one of them"
    return None


def _duration(recipe: "Recipe") -> str | None:
    return _one_of(recipe, DURATION_KEYS)


def _total_batch(recipe: "Recipe") -> str | None:
    if problem := _one_of(recipe, TOTAL_BATCH_KEYS):
        return problem
    total, micro = recipe.total_batch_size, recipe.per_device_train_batch_size
    accumulation = recipe.gradient_accumulation_steps
    if recipe.total_batch_tokens is not None:
        if recipe.total_batch_tokens < recipe.max_seq_length:
            return (
                f"total_batch_tokens {recipe.total_batch_tokens} is less than one sequence of "
                f"{recipe.max_seq_length} tokens: raise it, or lower max_seq_length"
            )
        total = recipe.total_batch_tokens // recipe.max_seq_length
    if total is None:
        return None
    if micro != "auto" and accumulation != "auto" and micro * accumulation != total:
        return (
            f"per_device_train_batch_size {micro} x gradient_accumulation_steps {accumulation} = "
            f"{micro * accumulation} sequences per step, but the total batch is {total}: drop one of the three"
        )
    if micro != "auto" and micro > total:
        return f"per_device_train_batch_size {micro} is more than the total batch of {total}: lower it to {total}"
    if accumulation != "auto" and accumulation > total:
        return f"gradient_accumulation_steps {accumulation} is more than the total batch of {total} sequences"
    return None


def _heads(recipe: "Recipe") -> str | None:
    settings = recipe.model_settings if isinstance(recipe.model_settings, dict) else {}
    width = recipe.hidden_size or settings.get("hidden_size") or settings.get("n_embd")
    heads = recipe.num_attention_heads or settings.get("num_attention_heads") or settings.get("n_head")
    kv_heads = recipe.num_key_value_heads or settings.get("num_key_value_heads")
    if not all(value is None or isinstance(value, int) for value in (width, heads, kv_heads)):
        return None
    if heads and kv_heads and heads % kv_heads:
        return f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}: change one of them"
    if width and heads and width % heads and not settings.get("head_dim"):
        return f"hidden_size {width} is not a multiple of num_attention_heads {heads}: change one of them"
    return None


def _name(recipe: "Recipe") -> str | None:
    if len(recipe.name) > _LONGEST_NAME:
        return f"name has {len(recipe.name)} characters, too many for a folder: use up to {_LONGEST_NAME}"
    if recipe.name.strip(" .") and not set(recipe.name) & set('<>:"/\\|?*'):
        return None
    return f"name {recipe.name!r} cannot name a folder on every system: use letters, digits, - and _"


def _device(recipe: "Recipe") -> str | None:
    kind, colon, index = recipe.device.partition(":")
    if recipe.device in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isdigit()):
        return None
    return f"device {recipe.device!r} is unknown: use auto, cpu, cuda or cuda:N"


def _scheduler(recipe: "Recipe") -> str | None:
    known = ("cosine", "wsd", "linear", "constant")
    if recipe.lr_scheduler_type not in known and ":" not in recipe.lr_scheduler_type:
        return (
            f"lr_scheduler_type {recipe.lr_scheduler_type!r} is unknown: use {', '.join(known)}, "
            "or module:function, a function of progress from 0 to 1 that returns a share of the peak rate"
        )
    return None


def _base(recipe: "Recipe") -> str | None:
    if recipe.model_name_or_path is None:
        if recipe.task == "sft":
            return "task sft needs a model that knows a language already: set model_name_or_path"
        if recipe.method != "full":
            return f"method {recipe.method} needs a trained model beside which adapters learn: set model_name_or_path"
        return None
    if recipe.model_settings:
        return "model_config has no effect: it needs a model from scratch, without model_name_or_path"
    if recipe.tokenizer in ("char", "bytes"):
        return f"tokenizer {recipe.tokenizer} has no effect: an existing model has its own; leave tokenizer out"
    return None


def _metric(recipe: "Recipe") -> str | None:
    metric = recipe.metric_for_best_model
    if metric in ("auto", "loss", "eval_loss", *recipe.eval_tasks):
        return None
    known = ", ".join(("auto", "loss", *recipe.eval_tasks))
    return f"metric_for_best_model {metric!r} is not measured: use {known}, or add it to eval_tasks"


_CHECKS = (_metric, _base, _name, _duration, _total_batch, _heads, _device, _scheduler)
