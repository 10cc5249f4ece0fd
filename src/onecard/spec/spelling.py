"""Other names people know settings by, and other ways to write their values. One row per name."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onecard.spec.accepts import FIELDS, MODEL_CONFIG, accepts, default_of, join_or, parse_bool, parse_number
from onecard.spec.values import column, fits_itself, mixed_precision, no_mixed_precision, on_cpu, only, stage, strategy


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


def _rows(key: str, *names: str) -> list[Spelling]:
    return [Spelling(name, key) for name in names]


# Either way gives the same gradients.
_REENTRANT: tuple[Any, ...] = (None, {}, {"use_reentrant": False}, {"use_reentrant": True})
_NO_REMOTE_CODE = "no code that comes with a model is ever run: take a model of a class that transformers has"
_NOTHING_OVERWRITTEN = "no run is ever written over: give another output_dir, or remove that folder first"

# What other tools ask and onecard answers in one way, whatever the recipe: the key is the one it is nearest to.
_ANSWERED = tuple(
    Spelling(name, key, only(*values, otherwise=otherwise))
    for name, key, values, otherwise in (
        ("ddp_find_unused_parameters", "device", (True, False, None), ""),
        ("local_rank", "device", (-1, 0), ""),
        ("num_processes", "device", (1,), "it is a flag of the command, whatever the recipe: --num_processes 2"),
        ("deepspeed", "device", (None, ""), "one card needs no deepspeed: leave it out"),
        ("fsdp", "device", (None, "", []), "leave it out, or set strategy fsdp for a run that several processes share"),
        ("tf32", "precision", (True, False, None), ""),
        ("use_liger_kernel", "loss_chunk_size", (True, False), ""),  # the loss is computed in chunks here, too
        ("padding_free", "packing", (True, False), ""),
        ("gradient_checkpointing_kwargs", "gradient_checkpointing", _REENTRANT, "it knows use_reentrant alone"),
        ("lr_scheduler_kwargs", "lr_scheduler_type", (None, {}), "set min_lr_ratio, decay_ratio or warmup_steps"),
        ("label_smoothing_factor", "learning_rate", (0, 0.0), "the loss is never smoothed: leave it out"),
        ("neftune_noise_alpha", "dropout", (None, 0), "no noise is put on embeddings: leave it out"),
        ("logging_first_step", "logging_steps", (True, False), ""),
        ("disable_tqdm", "logging_steps", (True, False), ""),
        ("log_level", "logging_steps", ("passive", "info", "warning", "error"), ""),
        ("include_tokens_per_second", "logging_steps", (True, False), ""),
        ("include_num_input_tokens_seen", "logging_steps", (True, False, "all", "non_padding", "no"), ""),
        ("save_safetensors", "save_steps", (True,), "weights are only ever saved as safetensors: leave it out"),
        ("save_only_model", "save_steps", (False,), "checkpoints are always whole, so that runs can be resumed"),
        ("ignore_data_skip", "resume_from_checkpoint", (False,), "a resumed run goes on with the data it had left"),
        ("dataloader_drop_last", "dataset", (False,), "no row is dropped: leave it out"),
        ("label_names", "dataset", (None, ["labels"]), ""),
        ("do_eval", "eval_steps", (True,), "set eval_fraction: 0 to hold nothing out"),
        ("eval_on_start", "eval_steps", (False,), "onecard evaluates at intervals and at the end alone"),
        ("prediction_loss_only", "eval_steps", (True, False), ""),
    )
)

SPELLINGS: tuple[Spelling, ...] = (
    # Text
    *_rows("dataset", "data", "data_path", "train_file", "dataset_name", "train_data", "data_dir", "train_dataset"),
    Spelling("text_column", "dataset", column, deferred=True),
    *_rows("eval_dataset", "eval_data", "validation_file", "val_data", "eval_file"),
    *_rows("eval_fraction", "validation_split", "val_fraction", "val_split", "val_size"),
    *_rows("tokenizer", "tokenizer_name", "tokenizer_name_or_path", "tokenizer_path"),
    *_rows("max_seq_length", "model_max_length", "block_size", "context_length", "seq_len", "seq_length", "n_ctx"),
    *_rows("max_seq_length", "max_length", "max_seq_len", "sequence_length", "n_positions", "cutoff_len"),
    Spelling("dataset_text_field", "dataset", column, deferred=True),
    # Chats
    *_rows("chat_template", "chat_template_path"),
    Spelling("group_by_length", "packing", only(True, False)),  # changes nothing of what is learned
    Spelling("stage", "task", stage),
    Spelling("do_train", "task", only(True)),
    Spelling("assistant_only_loss", "task", only(True)),
    Spelling("completion_only_loss", "task", only(True)),
    # Model
    *_rows(MODEL_CONFIG, "model_settings"),
    *_rows("model_name_or_path", "model_name", "model_path", "base_model", "pretrained_model_name_or_path", "model"),
    Spelling("trust_remote_code", "model_name_or_path", only(False, otherwise=_NO_REMOTE_CODE)),
    # Adapters
    *_rows("method", "finetuning_type"),
    *_rows("lora_r", "lora_rank"),
    *_rows("lora_target_modules", "target_modules", "lora_target"),
    *_rows("double_quant", "bnb_4bit_use_double_quant", "use_bnb_nested_quant"),
    Spelling("load_in_4bit", "method", parse_bool, deferred=True),
    Spelling("use_peft", "method", parse_bool, deferred=True),
    Spelling("bnb_4bit_quant_type", "method", only("nf4")),
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
    Spelling("mixed_precision", "precision", mixed_precision),
    Spelling("no_mixed_precision", "precision", no_mixed_precision),
    Spelling("fp16", "precision", parse_bool, deferred=True),
    Spelling("bf16", "precision", parse_bool, deferred=True),
    Spelling("fp32", "precision", parse_bool, deferred=True),
    *_rows("precision", "dtype", "torch_dtype"),
    *_rows("torch_compile", "compile"),
    *_rows("deterministic", "full_determinism"),
    Spelling("auto_find_batch_size", "fit", fits_itself),
    Spelling("use_cpu", "device", on_cpu),
    Spelling("no_cuda", "device", on_cpu),
    *_rows("gradient_checkpointing", "activation_checkpointing"),
    *_rows("dataloader_num_workers", "num_workers"),
    *_rows("dataloader_prefetch_factor", "prefetch_factor"),
    *_rows("dataset_num_proc", "num_proc", "preprocessing_num_workers"),
    # Watching
    *_rows("eval_steps", "eval_interval"),
    *_rows("save_steps", "save_interval"),
    *_rows("logging_steps", "log_interval"),
    *_rows("eval_batches", "eval_iters", "max_eval_batches"),
    Spelling("eval_strategy", "eval_steps", strategy("eval_steps")),
    Spelling("evaluation_strategy", "eval_steps", strategy("eval_steps")),
    Spelling("save_strategy", "save_steps", strategy("save_steps")),
    Spelling("logging_strategy", "logging_steps", strategy("logging_steps")),
    *_rows("early_stopping_patience", "patience"),
    Spelling("use_wandb", "report_to", parse_bool, deferred=True),
    Spelling("use_tensorboard", "report_to", parse_bool, deferred=True),
    Spelling("load_best_model_at_end", "save_total_limit", only(True, False)),
    Spelling("greater_is_better", "save_total_limit", only(False)),
    Spelling("remove_unused_columns", "dataset", only(True, False)),
    Spelling("dataloader_pin_memory", "dataloader_num_workers", only(True)),
    Spelling("push_to_hub", "output_dir", only(False)),
    Spelling("overwrite_output_dir", "output_dir", only(False, otherwise=_NOTHING_OVERWRITTEN)),
    *_ANSWERED,
    *_rows("output_dir", "out_dir"),
    *_rows("resume_from_checkpoint", "resume"),
)

# Settings of other tools that have no like, and whose names look like those of something else.
_SAID_OTHERWISE = {
    "template": "leave it out for the tokenizer's own, or set chat_template",
    "max_samples": "give fewer rows (of a Hub data set, split: train[:1000])",
    "quantization_bit": "for 4 bits set method: qlora",
    "data_seed": "seed draws weights, order and dropout alike",
    "logging_dir": "all of a run lies in its output_dir",
    "hub_model_id": "nothing is uploaded; onecard export writes the folder to do it with",
    "eval_accumulation_steps": "leave it out, evaluation never keeps logits",
    "torch_empty_cache_steps": "leave it out, the plan knows what the allocator keeps",
    "dataset_kwargs": "leave it out, chats are prepared in one way",
    "eos_token": "leave it out, the chat template and the tokenizer say what ends an answer",
    "pad_token": "leave it out, padding is never seen and needs no token",
}
_BY_NAME = {row.name: row for row in SPELLINGS}


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


def advise(name: str) -> str:
    """Says after the name of no setting what to do instead; empty where nothing is like it."""
    otherwise = _SAID_OTHERWISE.get(_with_underscores(name).lower())
    return f": {otherwise}" if otherwise else did_you_mean(nearest(name))


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
            # Those that are merely answered are no other names of it.
            spellings=tuple(row.name for row in SPELLINGS if row.key == key and row not in _ANSWERED),
        )
        for key, field in FIELDS.items()
    ]
