"""A plan as short lines for people."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from onecard.spec import EvalTasksPlan, Plan


def summary_rows(plan: "Plan", run_folder: Path | None = None) -> list[tuple[str, str]]:
    """Says what will be trained, how, on what, and where it goes: label and text per row."""
    schedule = plan.schedule
    num_tokens = schedule.num_steps * plan.tokens_per_step
    rows = [
        ("device", _describe_device(plan)),
        ("model", _describe_model(plan)),
        *([("new tokens", f"{', '.join(new)}, of the chat template")] if (new := plan.corpus.new_tokens) else ()),
        *([("learned too", learned)] if (learned := plan.reasons.get("model.base.untrained_tokens")) else ()),
        ("batch", _describe_batch(plan)),
        *([("", cut)] if (cut := plan.reasons.get("micro_batch_size.asked")) else ()),
        (
            "steps",
            f"{schedule.num_steps} = {format_count(num_tokens)} tokens, "
            f"{_describe_epochs(plan, num_tokens)}{_describe_limit(plan)}{_describe_intervals(plan)}",
        ),
        ("optimizer", f"{plan.optimizer.name}, {schedule.name} schedule, {schedule.num_warmup_steps} steps of warmup"),
        ("data", _describe_data(plan)),
    ]
    if plan.eval_tasks is not None:
        rows.append(("scored by", _describe_tasks(plan, plan.eval_tasks)))
    if run_folder is not None:
        rows.append(("run folder", str(run_folder)))
    return rows


def reason_rows(plan: "Plan") -> list[tuple[str, str, str]]:
    """Lists every decision with its reason: field, value, reason."""
    return [(name, _value_text(plan, name), reason) for name, reason in plan.reasons.items()]


def _describe_data(plan: "Plan") -> str:
    corpus = plan.corpus
    text = f"{format_count(corpus.num_train_tokens)} tokens"
    if corpus.num_train_rows is not None:
        text = f"{format_count(corpus.num_train_rows)} chats, {text}"
    if corpus.num_target_tokens is not None:
        text += f" ({format_count(corpus.num_target_tokens)} of answers)"
    elif corpus.train_bytes:
        text += f" ({format_bytes(corpus.train_bytes)})"
    text += f" to train, {format_count(corpus.num_heldout_tokens)} held out"
    # That of a plan for a card may not have been read.
    if corpus.vocab_size:
        text += f", vocabulary {corpus.vocab_size}"
    if not corpus.is_estimate:
        return text
    return f"about {text}, estimated from file sizes"


def _describe_epochs(plan: "Plan", num_tokens: int) -> str:
    # A plan for a card needs no text, and then there is nothing to divide by.
    known = plan.corpus.num_train_tokens
    return f"{num_tokens / known:.1f} epochs, " if known else ""


def _describe_limit(plan: "Plan") -> str:
    if plan.max_hours is None:
        return ""
    return f"or {format_seconds(3600 * plan.max_hours)}, whichever comes first, "


def _describe_model(plan: "Plan") -> str:
    settings = plan.model.settings
    parts = [str(settings.get("model_type", "model")), f"{format_count(plan.model.num_parameters)} parameters"]
    # GPT-2's configuration has names of its own for the same two numbers.
    for label, names in (("layers", ("num_hidden_layers", "n_layer")), ("width", ("hidden_size", "n_embd"))):
        value = next((settings[name] for name in names if name in settings), None)
        if value is not None:
            parts.append(f"{value} {label}" if label == "layers" else f"{label} {value}")
    return ", ".join(parts)


def _describe_device(plan: "Plan") -> str:
    device = f"{plan.forecast.card} ({plan.device})" if plan.forecast and plan.device != "cpu" else plan.device
    num_ranks = plan.forecast.num_ranks if plan.forecast else 1
    ranks = f"{num_ranks} x " if num_ranks > 1 else ""
    shared = f", {plan.strategy}" if num_ranks > 1 else ""
    share = plan.max_power_share
    rests = f", computes at most {share:.4g} of the time (max_power_share)" if share is not None and share < 1 else ""
    return f"{ranks}{device}, {plan.precision}, {'compiled' if plan.torch_compile else 'not compiled'}{shared}{rests}"


def _describe_batch(plan: "Plan") -> str:
    if plan.task == "sft":
        what, sign = f"chats of up to {plan.max_seq_length} tokens", ", about "
    else:
        what, sign = f"sequences of {plan.max_seq_length} tokens", " = "
    text = f"{plan.total_batch_size} {what}{sign}{format_count(plan.tokens_per_step)} per step"
    if plan.num_micro_batches == 1:
        return text
    return f"{text}, in {plan.num_micro_batches} micro-batches of {plan.micro_batch_size}"


def _describe_intervals(plan: "Plan") -> str:
    def when(steps: int) -> str:
        return f"every {steps}" if 0 < steps < plan.schedule.num_steps else "at the end"

    intervals = {"evaluation": plan.eval_steps, "samples": plan.sample_steps, "checkpoint": plan.save_steps}
    return ", ".join(f"{name} {when(steps)}" for name, steps in intervals.items())


def _describe_tasks(plan: "Plan", tasks: "EvalTasksPlan") -> str:
    num_saves = -(-plan.schedule.num_steps // plan.save_steps)
    parts = [
        f"{', '.join(tasks.names)}: {num_saves} x {tasks.limit} items, then all of those that lead",
        f"responses of up to {tasks.max_new_tokens} tokens",
    ]
    if tasks.cache_bytes:
        parts.append(f"up to {format_bytes(tasks.cache_bytes)} at once beside the model")
    return f"{', '.join(parts)}; its time comes on top"


def _value_text(plan: "Plan", name: str) -> str:
    """Writes the value of a field, or of a field within a part: `schedule.num_steps`; empty for a part as a whole."""
    value: Any = plan
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return str(value) if isinstance(value, str | int | float) else ""
