"""Other names people know settings by, and other ways to write their values. One row per name."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onecard.spec.accepts import FIELDS, MODEL_CONFIG, accepts, default_of, join_or, parse_bool, parse_number
from onecard.units import GIB, parse_bytes

# What `translate` returns for a value that asks for what happens anyway.
NO_EFFECT = object()


@dataclass(frozen=True)
class Spelling:
    """A name that stands for a recipe key.

    `translate` turns the value into one the key takes. A `deferred` name keeps its own value until all layers are
    merged, because what it does to its key depends on other settings (`min_lr` needs the final learning rate).
    """

    name: str
    key: str
    translate: Callable[[Any], Any] | None = None
    deferred: bool = False


def _mixed_precision(value: Any) -> str:
    text = str(value).strip().lower()
    if text in ("bf16", "fp16", "fp32", "auto"):
        return text
    try:
        return "auto" if parse_bool(value) else "fp32"
    except ValueError:
        raise ValueError("takes true, false, bf16, fp16, fp32 or auto") from None


def _no_mixed_precision(value: Any) -> str:
    return "fp32" if parse_bool(value) else "auto"


def _strategy(value: Any) -> Any:
    """`steps` is what onecard does anyway; `no` leaves the one at the end (0)."""
    text = str(value).strip().lower()
    if text == "steps":
        return NO_EFFECT
    if value is False or text in ("no", "none"):
        return 0
    raise ValueError("takes steps or no, because onecard counts in steps: set eval_steps or save_steps")


def _only(*wanted: Any) -> Callable[[Any], Any]:
    """For settings of other tools of which onecard knows one value, the one it always has."""

    def check(value: Any) -> Any:
        text = str(value).strip().lower()
        if text in (str(each).lower() for each in wanted):
            return NO_EFFECT
        raise ValueError(f"onecard knows only {join_or([str(each).lower() for each in wanted])} here")

    return check


def _column(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError("takes the name of a column")


def _rows(key: str, *names: str) -> list[Spelling]:
    return [Spelling(name, key) for name in names]


SPELLINGS: tuple[Spelling, ...] = (
    # Text
    *_rows("dataset", "data", "data_path", "train_file", "dataset_name", "train_data", "data_dir", "train_dataset"),
    Spelling("text_column", "dataset", _column, deferred=True),
    *_rows("eval_dataset", "eval_data", "validation_file", "val_data", "eval_file"),
    *_rows("eval_fraction", "validation_split", "val_fraction", "val_split"),
    *_rows("tokenizer", "tokenizer_name", "tokenizer_name_or_path", "tokenizer_path"),
    *_rows("max_seq_length", "model_max_length", "block_size", "context_length", "seq_len", "seq_length", "n_ctx"),
    *_rows("max_seq_length", "max_length", "max_seq_len", "sequence_length", "n_positions"),
    Spelling("dataset_text_field", "dataset", _column, deferred=True),
    # Chats
    *_rows("chat_template", "chat_template_path"),
    Spelling("assistant_only_loss", "task", _only(True)),
    Spelling("completion_only_loss", "task", _only(True)),
    # Model
    *_rows(MODEL_CONFIG, "model_settings"),
    *_rows("model_name_or_path", "model_name", "model_path", "base_model", "pretrained_model_name_or_path", "model"),
    Spelling("trust_remote_code", "model_name_or_path", _only(False)),
    # Adapters
    *_rows("lora_r", "lora_rank"),
    *_rows("lora_target_modules", "target_modules", "lora_target"),
    *_rows("double_quant", "bnb_4bit_use_double_quant", "use_bnb_nested_quant"),
    Spelling("load_in_4bit", "method", parse_bool, deferred=True),
    Spelling("use_peft", "method", parse_bool, deferred=True),
    Spelling("bnb_4bit_quant_type", "method", _only("nf4")),
    *_rows("precision", "bnb_4bit_compute_dtype"),
    *_rows("hidden_size", "hidden_dim", "d_model", "n_embd", "dim", "embed_dim", "width"),
    *_rows("intermediate_size", "ffn_dim", "mlp_dim", "n_inner", "d_ff"),
    *_rows("num_hidden_layers", "n_layers", "n_layer", "num_layers", "depth"),
    *_rows("num_attention_heads", "n_heads", "n_head", "num_heads"),
    *_rows("num_key_value_heads", "n_kv_heads", "n_kv_head", "num_kv_heads"),
    # Batch
    *_rows("per_device_train_batch_size", "batch_size", "train_batch_size", "micro_batch_size"),
    *_rows("per_device_train_batch_size", "per_gpu_train_batch_size"),
    *_rows("per_device_eval_batch_size", "eval_batch_size", "per_gpu_eval_batch_size"),
    *_rows("gradient_accumulation_steps", "grad_accum", "accumulation_steps", "gradient_accumulation"),
    *_rows("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches"),
    # Optimizer and schedule
    *_rows("optim", "optimizer"),
    *_rows("learning_rate", "lr"),
    *_rows("muon_learning_rate", "muon_lr"),
    *_rows("adam_beta1", "beta1"),
    *_rows("adam_beta2", "beta2"),
    *_rows("adam_epsilon", "eps", "epsilon", "adam_eps"),
    *_rows("max_grad_norm", "grad_clip", "clip_grad_norm", "gradient_clipping"),
    *_rows("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"),
    *_rows("warmup_steps", "warmup_iters", "num_warmup_steps"),
    Spelling("min_lr", "min_lr_ratio", parse_number, deferred=True),
    # Duration
    *_rows("num_train_epochs", "max_epochs", "epochs", "num_epochs"),
    *_rows("max_steps", "max_iters", "max_train_steps", "num_steps", "num_train_steps"),
    # Machine
    Spelling("mixed_precision", "precision", _mixed_precision),
    Spelling("no_mixed_precision", "precision", _no_mixed_precision),
    Spelling("fp16", "precision", parse_bool, deferred=True),
    Spelling("bf16", "precision", parse_bool, deferred=True),
    Spelling("fp32", "precision", parse_bool, deferred=True),
    *_rows("precision", "dtype", "torch_dtype"),
    *_rows("torch_compile", "compile"),
    *_rows("gradient_checkpointing", "activation_checkpointing"),
    *_rows("dataloader_num_workers", "num_workers"),
    *_rows("dataloader_prefetch_factor", "prefetch_factor"),
    *_rows("dataset_num_proc", "num_proc", "preprocessing_num_workers"),
    # Watching
    *_rows("eval_steps", "eval_interval"),
    *_rows("save_steps", "save_interval"),
    *_rows("logging_steps", "log_interval"),
    *_rows("eval_batches", "eval_iters", "max_eval_batches"),
    Spelling("eval_strategy", "eval_steps", _strategy),
    Spelling("evaluation_strategy", "eval_steps", _strategy),
    Spelling("save_strategy", "save_steps", _strategy),
    *_rows("early_stopping_patience", "patience"),
    Spelling("use_wandb", "report_to", parse_bool, deferred=True),
    Spelling("use_tensorboard", "report_to", parse_bool, deferred=True),
    Spelling("load_best_model_at_end", "save_total_limit", _only(True, False)),
    Spelling("greater_is_better", "save_total_limit", _only(False)),
    Spelling("remove_unused_columns", "dataset", _only(True, False)),
    Spelling("dataloader_pin_memory", "dataloader_num_workers", _only(True)),
    Spelling("push_to_hub", "output_dir", _only(False)),
    Spelling("overwrite_output_dir", "output_dir", _only(False)),
    *_rows("output_dir", "out_dir"),
    *_rows("resume_from_checkpoint", "resume"),
)

_BY_NAME = {row.name: row for row in SPELLINGS}


def _schedule_name(value: Any) -> Any:
    return {"warmup_stable_decay": "wsd", "cosine_with_min_lr": "cosine"}.get(str(value).lower(), value)


def _optimizer_name(value: Any) -> Any:
    names = {
        "adamw": ("adamw_torch_fused", "adamw_torch", "adamw_hf", "adam", "adamw_fused"),
        "adamw_8bit": ("adamw_bnb_8bit", "adamw8bit", "adam_8bit", "adam8bit"),
        "paged_adamw": ("paged_adamw_32bit",),
    }
    text = str(value).lower()
    return next((name for name, others in names.items() if text in others), value)


def _precision_name(value: Any) -> Any:
    names = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
    return names.get(str(value).lower().removeprefix("torch."), value)


def _clip(value: Any) -> Any:
    return None if value in (0, "0", "0.0") and value is not False else value


def _no_limit(value: Any) -> Any:
    """transformers writes -1 for a number of steps that nobody gave."""
    return None if value in (-1, "-1") else value


def _gibibytes(value: Any) -> Any:
    """A plain number is one of GiB; with a unit it says itself what it is."""
    num_bytes = parse_bytes(value) if isinstance(value, str) else None
    return value if num_bytes is None else num_bytes / GIB


def _device_name(value: Any) -> Any:
    text = str(value).strip().lower()
    if text.isdigit() and not isinstance(value, bool):
        return f"cuda:{text}"
    return "cuda" if text == "gpu" else text if isinstance(value, str) else value


def _report_targets(value: Any) -> Any:
    """YAML reads `no` as false."""
    return [] if value is False or str(value).lower() in ("no", "none") else value


def _resume(value: Any) -> Any:
    try:
        return parse_bool(value) if value is not None else None
    except ValueError:
        return value


# Values of a key as other tools write them, whatever the key is called.
VALUES: dict[str, Callable[[Any], Any]] = {
    "lr_scheduler_type": _schedule_name,
    "optim": _optimizer_name,
    "precision": _precision_name,
    "max_grad_norm": _clip,
    "max_steps": _no_limit,
    "device": _device_name,
    "memory_limit_gb": _gibibytes,
    "report_to": _report_targets,
    "resume_from_checkpoint": _resume,
}


def find_spelling(name: str) -> Spelling | None:
    """Finds what a name stands for, with dashes as underscores and in any case; None if nothing is called so."""
    for candidate in (_with_underscores(name), _with_underscores(name).lower()):
        if candidate in FIELDS:
            return Spelling(candidate, candidate)
        if candidate in _BY_NAME:
            return _BY_NAME[candidate]
    return None


def find_key(name: Any) -> str:
    """Names the recipe key that a name stands for, an entry of a transformers config included; empty if none does."""
    spelling = find_spelling(str(name))
    return spelling.key if spelling else ""


def nearest(name: str, known: list[str] | None = None) -> list[str]:
    """Names up to three known ones that look like `name`, the likeliest first and one for each key.

    Among names that are much alike, others that only share a few letters would confuse.
    """
    wanted = _with_underscores(name).lower()
    candidates = [*FIELDS, *_BY_NAME] if known is None else known
    alike = difflib.get_close_matches(wanted, candidates, n=10, cutoff=0.6)
    best_of_key: dict[str, tuple[float, str]] = {}
    for candidate in alike:
        likeness = difflib.SequenceMatcher(None, wanted, candidate).ratio()
        key = _BY_NAME[candidate].key if known is None and candidate in _BY_NAME else candidate
        best_of_key[key] = max(best_of_key.get(key, (0.0, "")), (likeness, candidate))
    ranked = sorted(best_of_key.values(), reverse=True)[:3]
    return [candidate for likeness, candidate in ranked if likeness > ranked[0][0] - 0.1]


def did_you_mean(names: list[str]) -> str:
    """Writes the question for `nearest`; empty without names."""
    return f"; did you mean {join_or(names)}?" if names else ""


def _with_underscores(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_")


@dataclass(frozen=True)
class KeyInfo:
    """A recipe key for help texts: what it takes, its default, and the other names it goes by."""

    name: str
    type: str
    default: Any
    description: str
    spellings: tuple[str, ...]


def recipe_keys() -> list[KeyInfo]:
    """Lists every key of a recipe in the order of the type."""
    return [
        KeyInfo(
            name=key,
            type=accepts(key).text,
            default=default_of(key),
            description=field.description or "",
            spellings=tuple(row.name for row in SPELLINGS if row.key == key),
        )
        for key, field in FIELDS.items()
    ]
