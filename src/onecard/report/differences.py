"""Settings in which runs differ: decisions of their plans by the names of recipe keys, and what only a recipe says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.report.record import RunRecord
from onecard.spec.agreement import DEPENDENCES
from onecard.spec.dump import plain, values_of

GROUPS = ("data", "model", "batch", "optimizer", "duration", "machine", "watching", "versions")

# Of a plan: what is no setting but a reason, a forecast or a measurement, and what follows from other settings.
_NO_SETTINGS = {"reasons", "forecast", "alternatives", "flops_per_token", "peak_flops"}
_FOLLOWS = {
    *("model.num_matrix_parameters", "model.base.folder", "model.base.download_bytes", "model.settings.layer_types"),
    *("corpus.is_estimate", "corpus.control_tokens", "corpus.tokens_of_sources", "corpus.separator_id"),
    *("model.settings.vocab_size", "eval_tasks.cache_bytes", "model.settings.transformers_version"),
}
_GROUP_OF = {
    **dict.fromkeys(("corpus",), "data"),
    **dict.fromkeys(("task", "model", "adapt"), "model"),
    **dict.fromkeys(("max_seq_length", "packing", "micro_batch_size", "total_batch_size"), "batch"),
    **dict.fromkeys(("optimizer", "schedule", "seed", "on_nonfinite"), "optimizer"),
    **dict.fromkeys(("max_hours", "early_stopping_patience"), "duration"),
    **dict.fromkeys(("eval_steps", "eval_batches", "eval_batch_size", "eval_tasks"), "watching"),
    **dict.fromkeys(("save_steps", "save_minutes", "save_total_limit"), "watching"),
    **dict.fromkeys(("sample_steps", "sample_prompts", "sample_max_new_tokens"), "watching"),
}
_LABELS = {
    "optimizer.name": "optim",
    "schedule.name": "lr_scheduler_type",
    "schedule.num_steps": "steps",
    "schedule.num_warmup_steps": "warmup_steps",
    "schedule.num_decay_steps": "decay_steps",
    "corpus.fingerprint": "fingerprint",
    "model.num_parameters": "parameters",
    "model.base.name": "model_name_or_path",
    "model.base.fingerprint": "fingerprint of the base",
    "adapt.r": "lora_r",
    "adapt.target_modules": "lora_target_modules",
    "adapt.bias": "lora_bias",
    "eval_tasks.names": "eval_tasks",
    "eval_tasks.metric": "metric_for_best_model",
    "eval_tasks.limit": "eval_limit",
    "eval_tasks.max_new_tokens": "eval_max_new_tokens",
    "eval_tasks.batch_size": "batch_size of eval_tasks",
    "eval_tasks.num_items": "items of eval_tasks",
    "eval_tasks.data": "data of eval_tasks",
}
# Of a recipe: what the plan has settled or repeats, and what says where a run is and who watches it.
_SETTLED = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "total_batch_tokens"),
    *("per_device_eval_batch_size", "warmup_ratio", "decay_ratio", "max_steps", "num_train_epochs", "max_tokens"),
    *("model_config", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "tie_word_embeddings", "memory_limit_gb", "reserve_gb"),
}
_NOT_COMPUTED = {
    *("name", "description", "output_dir", "run_name", "resume_from_checkpoint", "report_to", "logging_steps"),
    *("size", "sizes", "on_device", "max_restarts", "ddp_timeout"),
}
_GROUP_OF_KEY = {
    **dict.fromkeys(("method", "model_name_or_path", "init", "dropout"), "model"),
    **dict.fromkeys(("max_hours", "early_stopping_patience"), "duration"),
    **dict.fromkeys(
        ("eval_tasks", "metric_for_best_model", "ifeval_data", "eval_batches", "sample_prompts"), "watching"
    ),
    "fit": "machine",
}
_VERSIONS = ("onecard", "torch", "transformers")


@dataclass(frozen=True)
class Difference:
    """A setting and its value in each run, in the order of the runs; None where a run does not have it."""

    group: str
    name: str
    values: tuple[Any, ...]


def find_differences(runs: Sequence[RunRecord]) -> tuple[Difference, ...]:
    """Finds the settings in which runs differ, by group and in the order of plan and recipe; defaults are filled in."""
    has_recipes = all(run.recipe is not None for run in runs)
    settings = [settings_of(run, with_recipe=has_recipes) for run in runs]
    names = dict.fromkeys(key for values in settings for key in values)
    found = [Difference(*key, tuple(values.get(key) for values in settings)) for key in names]
    differing = [row for row in found if _differs(row)]
    return tuple(sorted(differing, key=lambda row: GROUPS.index(row.group)))


def _differs(row: Difference) -> bool:
    # Of a run without scores versions are not known, which is no difference.
    values = [value for value in row.values if value is not None or row.group != "versions"]
    return any(value != values[0] for value in values)


def settings_of(run: RunRecord, *, with_recipe: bool) -> dict[tuple[str, str], Any]:
    """Gives settings by group and name: what a run's plan decided and, if asked for, what only its recipe says."""
    flat = _flatten(run.plan.model_dump(mode="json", exclude=_NO_SETTINGS))
    labels = {path: _LABELS.get(path, path.rpartition(".")[2]) for path, _ in flat if path not in _FOLLOWS}
    decided = {
        (_GROUP_OF.get(path.partition(".")[0], "machine"), labels[path]): value
        for path, value in flat
        if path in labels and value is not None
    }
    if run.card is not None:
        decided["machine", "card"] = run.card
    for name in dict.fromkeys(name for line in run.versions for name in line.versions):
        decided["versions", name] = _over_time(name, run)
    # Scores may have been measured later, with others: the newest say with what.
    protocols = [row["protocol"] for row in run.score_rows if isinstance(row.get("protocol"), dict)]
    for name in _VERSIONS:
        if protocols and name in protocols[-1]:
            decided["versions", f"{name} (of scores)"] = protocols[-1][name]
    if run.recipe is None or not with_recipe:
        return decided
    idle = {key for row in DEPENDENCES if not row.holds(vars(run.recipe)) for key in row.keys}
    # What a corpus is is a fact, whatever the recipe could ask for.
    decided = {key: value for key, value in decided.items() if key[0] == "data" or key[1] not in idle}
    known = {*labels.values()} | _SETTLED | _NOT_COMPUTED | idle
    asked = {
        (_GROUP_OF_KEY.get(key, "data"), key): plain(value)
        for key, value in values_of(run.recipe).items()
        if key not in known
    }
    return asked | decided


def _over_time(name: str, run: RunRecord) -> str:
    """The version that a run began with, and each later one with the step it came after."""
    words: list[str] = []
    before = None
    for line in run.versions:
        number = line.versions.get(name, "not known")
        if number != before:
            words.append(f"{number} from step {line.step}" if words else number)
        before = number
    return ", ".join(words)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flatten(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found
