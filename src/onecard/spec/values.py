"""Values as other tools write them, turned into those that a recipe takes."""

from collections.abc import Callable
from typing import Any

from onecard.spec.accepts import join_or, parse_bool
from onecard.units import GIB, parse_bytes

# What a translation returns for a value that asks for what happens anyway.
NO_EFFECT = object()


def mixed_precision(value: Any) -> str:
    text = str(value).strip().lower()
    if text in ("bf16", "fp16", "fp32", "auto"):
        return text
    try:
        return "auto" if parse_bool(value) else "fp32"
    except ValueError:
        raise ValueError("takes true, false, bf16, fp16, fp32 or auto") from None


def no_mixed_precision(value: Any) -> str:
    return "fp32" if parse_bool(value) else "auto"


def on_cpu(value: Any) -> Any:
    return "cpu" if parse_bool(value) else NO_EFFECT


def fits_itself(value: Any) -> str:
    """transformers shrinks the batch after each failure; a plan that may change settings does it beforehand."""
    return "auto" if parse_bool(value) else "given"


def strategy(key: str) -> Callable[[Any], Any]:
    """`steps` is what onecard does anyway; the plan counts an `epoch` in steps; `no` leaves the one at the end (0)."""

    def read(value: Any) -> Any:
        text = str(value).strip().lower()
        if text == "steps":
            return NO_EFFECT
        if text == "epoch":
            return text
        if key == "logging_steps":
            raise ValueError("takes steps or epoch, because progress is always told: for fewer lines set logging_steps")
        if value is False or text in ("no", "none"):
            return 0
        raise ValueError(f"takes steps, epoch or no: leave it out for ten times in a run, or set {key}")

    return read


def only(*wanted: Any, otherwise: str = "") -> Callable[[Any], Any]:
    """For settings of other tools of which onecard knows one value, the one it always has, or that say nothing here.

    `otherwise` says why there is no other, and what to do instead.
    """

    def check(value: Any) -> Any:
        text = str(value).strip().lower()
        if text in (str(each).lower() for each in wanted):
            return NO_EFFECT
        raise ValueError(otherwise or f"onecard knows only {join_or([str(each).lower() for each in wanted])} here")

    return check


def column(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError("takes the name of a column")


def stage(value: Any) -> str:
    """LLaMA-Factory's word for the kind of training."""
    tasks = {"sft": "sft", "pt": "pretrain"}
    if (text := str(value).strip().lower()) in tasks:
        return tasks[text]
    raise ValueError("takes sft or pt, which is task pretrain: onecard trains by no preferences or rewards")


def _schedule_name(value: Any) -> Any:
    names = {"warmup_stable_decay": "wsd", "cosine_with_min_lr": "cosine", "constant_with_warmup": "constant"}
    return names.get(str(value).lower(), value)


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


def _attention_name(value: Any) -> Any:
    """Flash attention is what PyTorch's own attention runs where a card has it."""
    return "auto" if str(value).lower() in ("flash_attention_2", "flash_attention_3", "fa2") else value


def _metric_name(value: Any) -> Any:
    return "loss" if str(value).lower() == "eval_loss" else value


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
    """YAML reads `no` as false; all loggers are those that need no account."""
    if str(value).lower() == "all":
        return ["tensorboard"]
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
    "attn_implementation": _attention_name,
    "metric_for_best_model": _metric_name,
    "max_grad_norm": _clip,
    "max_steps": _no_limit,
    "device": _device_name,
    "memory_limit_gb": _gibibytes,
    "reserve_gb": _gibibytes,
    "report_to": _report_targets,
    "resume_from_checkpoint": _resume,
}
