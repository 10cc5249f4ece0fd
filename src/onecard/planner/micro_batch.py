"""How many sequences at once are the fastest on this CPU: a few sizes are tried, and the answer is remembered."""

import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from onecard.data.cache import cache_folder, short_hash, write_json
from onecard.hardware import Machine, give_back_freed_memory
from onecard.spec import Plan

Trial = Callable[[Plan, Sequence[int], float], dict[int, float]]

# Raised whenever the same trial would give another answer.
_VERSION = 1
# Of what the rule takes: an eighth, a quarter, half, all.
_NUM_HALVINGS = 3
_BUDGET_S, _SHARE_OF_RUN = 6.0, 0.03
# A run that pays for less than this is over before a choice matters.
_LEAST_BUDGET_S = 0.3
# Larger ones are faster as a rule: where a doubling loses less than this, which may be noise, the next may gain.
_CLEAR_LOSS = 1.04
_LEAST_SIZES = 3
# What of a plan shapes the passes of a micro-batch on a CPU.
_SHAPING = (
    *("task", "packing", "precision", "attn_implementation", "gradient_checkpointing", "loss_chunk_size"),
    *("max_seq_length", "micro_batch_size", "total_batch_size", "num_threads"),
)


def try_micro_batches(plan: Plan, machine: Machine, run_s: float, trial: Trial) -> Plan:
    """Gives a plan for this CPU the fastest of a few micro-batches up to its own; the effective batch stays.

    `run_s` is about how long the run takes: a share of it, seconds at most, is what trying may take. A plan that is to
    be deterministic keeps the micro-batch it has, which no clock has a say in.
    """
    most, reasons = plan.micro_batch_size, dict(plan.reasons)
    sizes = sorted({max(1, most >> halvings) for halvings in range(_NUM_HALVINGS + 1)})
    if len(sizes) == 1 or plan.deterministic:
        return plan
    path = _file_of(plan, machine, sizes)
    if (seconds := _read(path)) is None:
        budget_s = min(_BUDGET_S, _SHARE_OF_RUN * run_s)
        if budget_s < _LEAST_BUDGET_S:
            return plan
        seconds = trial(plan, sizes, budget_s)
        give_back_freed_memory()
        if not seconds:
            return plan
        _write(path, seconds)
    size = fastest(seconds, most)
    told = ", ".join(f"{size}: {value:.3g}" for size, value in seconds.items())
    if size in seconds:
        reasons["micro_batch_size"] = f"the fastest here of those tried, in seconds of passes a step: {told}"
    else:
        reasons["micro_batch_size"] += f"; smaller ones were slower here, in seconds of passes a step: {told}"
    return plan.model_copy(update={"micro_batch_size": size, "reasons": reasons})


def fastest(seconds: dict[int, float], most: int) -> int:
    """The size of the least seconds; `most` where it was not reached and nothing speaks clearly against it.

    Two sizes show no trend: on a busy machine one of them may be a fifth off.
    """
    tried = sorted(seconds)
    if tried[-1] < most and (len(tried) < _LEAST_SIZES or seconds[tried[-1]] < _CLEAR_LOSS * seconds[tried[-2]]):
        return most
    return min(tried, key=lambda size: seconds[size])


def _file_of(plan: Plan, machine: Machine, sizes: Sequence[int]) -> Path:
    facts = plan.corpus
    key = {
        "version": _VERSION,
        "packages": {name: version(name) for name in ("onecard", "torch", "transformers")},
        "machine": [platform.processor(), machine.num_cores, machine.ram_bytes, machine.has_bf16_cpu],
        "model": plan.model.model_dump(mode="json", exclude={"base": {"name", "folder", "fingerprint"}}),
        "adapt": plan.adapt.model_dump(mode="json") if plan.adapt else None,
        "chats": [facts.num_train_rows, facts.num_train_tokens, facts.num_target_tokens]
        if plan.task == "sft"
        else None,
        "sizes": list(sizes),
        **{name: getattr(plan, name) for name in _SHAPING},
    }
    return cache_folder() / "micro-batches" / f"{short_hash(key)}.json"


def _read(path: Path) -> dict[int, float] | None:
    try:
        found = {int(size): float(value) for size, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # a memory only: tried again
    return found if len(found) > 1 else None


def _write(path: Path, seconds: dict[int, float]) -> None:
    try:
        write_json(path, seconds)
    except OSError:
        return  # the plan is as good without
