"""Traces by content: the same settings are traced once per machine."""

import gzip
import json
import logging
import zlib
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from onecard.data.cache import cache_folder, short_hash
from onecard.errors import OnecardError
from onecard.planner.compiled import CannotTraceCompiled
from onecard.planner.looping import seconds_to_trace, shorten
from onecard.planner.recorder import Record, Work
from onecard.planner.trace import Trace, trace_plan
from onecard.spec import Plan
from onecard.units import format_seconds

log = logging.getLogger("onecard.planner")

# Raised whenever the same plan would give another record.
_VERSION = 10
# What of a plan shapes a step. The rest (seed, schedule, intervals) changes numbers, not storages.
_SHAPING = (
    *("precision", "torch_compile", "attn_implementation", "gradient_checkpointing", "max_seq_length"),
    *("micro_batch_size", "eval_batch_size", "task", "loss_chunk_size"),
)
_WORTH_TELLING_S = 20.0


class CannotTrace(Exception):
    """A step that does not run on tensors without values, so that nothing can be told of it beforehand."""


def trace_cached(plan: Plan, compute_capability: tuple[int, int] | None) -> Trace:
    """Traces a plan for a card of this capability or a CPU, or reads what an earlier call with equal settings left."""
    plan, has_borders = _traceable(plan)
    path = _file_of(plan, compute_capability, has_borders)
    if (found := _read(path)) is not None:
        return found
    _tell_long_trace(plan)
    try:
        trace = trace_plan(plan, compute_capability, has_borders=has_borders)
    except (OnecardError, CannotTraceCompiled):
        raise
    # Whatever a family's own code does that tensors without values cannot answer.
    except Exception as error:
        raise CannotTrace(" ".join(str(error).split())[:200] or type(error).__name__) from error
    _write(path, trace)
    return trace


def _tell_long_trace(plan: Plan) -> None:
    seconds = seconds_to_trace(plan)
    if seconds > _WORTH_TELLING_S:
        log.warning(
            "foreseeing a step takes about %s of one core: %s goes from token to token in Python. It is done once and "
            "remembered",
            format_seconds(seconds),
            plan.model.settings["model_type"],
        )


def is_traced(plan: Plan, compute_capability: tuple[int, int]) -> bool:
    """Whether an earlier call has left the trace of such a plan."""
    plan, has_borders = _traceable(plan)
    return _file_of(plan, compute_capability, has_borders).is_file()


def _traceable(plan: Plan) -> tuple[Plan, bool]:
    """The plan as it is traced, and whether documents end inside its rows."""
    plan = shorten(plan)
    if plan.attn_implementation == "varlen":
        # Its lengths are read from the data, of which there is none. Plain causal flash keeps the same tensors.
        return plan.model_copy(update={"attn_implementation": "sdpa"}), False
    return plan, plan.has_borders


def _file_of(plan: Plan, compute_capability: tuple[int, int] | None, has_borders: bool) -> Path:
    key = {
        "version": _VERSION,
        "packages": {name: version(name) for name in ("onecard", "torch", "transformers")},
        "capability": compute_capability,
        "has_borders": has_borders,
        "num_micro_batches": min(2, plan.num_micro_batches),
        # Where a model came from changes numbers, not storages.
        "model": plan.model.model_dump(mode="json", exclude={"base": {"name", "folder", "fingerprint"}}),
        "adapt": plan.adapt.model_dump(mode="json") if plan.adapt else None,
        "samples": [*(len(prompt.encode("utf-8")) for prompt in plan.sample_prompts), plan.sample_max_new_tokens],
        "optimizer": [plan.optimizer.name, plan.optimizer.max_grad_norm is None],
        **{name: getattr(plan, name) for name in _SHAPING},
    }
    return cache_folder() / "traces" / f"{short_hash(key)}.json.gz"


def _read(path: Path) -> Trace | None:
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        record = content.pop("record")
        work = [Work(**entry | {"shape": tuple(entry["shape"])}) for entry in record.pop("work")]
        labels = {int(number): label for number, label in record.pop("labels").items()}
        return Trace(record=Record(**record, labels=labels, work=work), **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, zlib.error):
        return None  # a memory only: traced again


def _write(path: Path, trace: Trace) -> None:
    content = gzip.compress(json.dumps(asdict(trace)).encode("utf-8"), compresslevel=5)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}")
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        return  # a full disk or a folder that may not be written: the plan is as good without
