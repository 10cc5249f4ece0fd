"""What a later layer of settings does to an earlier one.

    recipe file  <  its on_device section  <  chosen size  <  its on_device section  <  flags

A later layer does not only replace the same keys: `max_steps` as a flag also removes `num_train_epochs` from the file.
"""

from collections.abc import Mapping
from typing import Any

from onecard.spec.accepts import FIELDS, MODEL_CONFIG, default_of, show
from onecard.spec.agreement import DEPENDENCES, DURATION_KEYS, SHAPE_KEYS, TOTAL_BATCH_KEYS, WARMUP_KEYS
from onecard.spec.spelling import find_key

# Of each group a layer may give one; it replaces the others of earlier layers.
EXCLUSIVE: tuple[tuple[str, ...], ...] = (
    DURATION_KEYS,
    WARMUP_KEYS,
    TOTAL_BATCH_KEYS,
    ("min_lr", "min_lr_ratio"),
)
PRECISIONS = ("fp16", "bf16", "fp32")
_MICRO, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
# Keys of which one can remove another. A difference that touches one of them names all, to mean the same everywhere.
_COUPLED: tuple[tuple[str, ...], ...] = (
    DURATION_KEYS,
    WARMUP_KEYS,
    (*TOTAL_BATCH_KEYS, _MICRO, _ACCUMULATION),
    (MODEL_CONFIG, *SHAPE_KEYS),
    *(tuple(key for key in (*row.keys, *row.switches) if key in FIELDS) for row in DEPENDENCES),
)


def is_given(value: Any) -> bool:
    """Says whether a value decides something: null and auto leave it open."""
    return value is not None and value != "auto"


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Puts one layer's values on another's. Reports what cannot be merged."""
    dropped = _displaced(lower, upper)
    merged = {key: value for key, value in lower.items() if key not in dropped} | dict(upper)
    if MODEL_CONFIG in merged:
        merged[MODEL_CONFIG] = _merge_model_config(lower, upper, problems)
    return merged


def settle(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Turns deferred names into the keys they stand for, now that every layer has spoken."""
    settled = dict(values)
    _settle_min_lr(settled, problems)
    _settle_precision(settled)
    columns = [settled.pop(name, None) for name in ("text_column", "dataset_text_field")]
    if column := columns[0] or columns[1]:
        for key in {"dataset", "eval_dataset"} & set(settled):
            settled[key] = tuple(source.model_copy(update={"text_column": column}) for source in settled[key])
    targets = list(settled.get("report_to", default_of("report_to")))
    for name, target in (("use_tensorboard", "tensorboard"), ("use_wandb", "wandb")):
        wanted = settled.pop(name, None)
        if wanted is not None:
            targets = [other for other in targets if other != target] + [target] * wanted
            settled["report_to"] = tuple(targets)
    return settled


def difference(base: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Lists what must be merged into `base` to get `changed`, both settled."""
    default = {key: default_of(key) for key in FIELDS}
    old, new = default | dict(base), default | dict(changed)
    keys = {key for key in FIELDS if old[key] != new[key]}
    for group in _COUPLED:
        if keys & set(group):
            keys |= {key for key in group if not old[key] == new[key] == default[key]}
    return {key: new[key] for key in FIELDS if key in keys}


def _displaced(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> set[str]:
    """Names the keys of the lower layer that the upper one makes void."""
    given = {key for key, value in upper.items() if is_given(value)}
    dropped: set[str] = set()
    for group in EXCLUSIVE:
        if given & set(group):
            dropped |= set(group)
    if given & set(DURATION_KEYS):
        dropped.add("max_hours")
    if "precision" in upper or any(upper.get(name) is True for name in PRECISIONS):
        dropped |= {"precision", *PRECISIONS}
    if "dataset" in given:
        dropped |= {"text_column", "dataset_text_field"}
    if "model_name_or_path" in given:
        # A trained model has a config and a tokenizer of its own.
        dropped |= {MODEL_CONFIG, "tokenizer"}
    if "method" in given:
        dropped |= {"load_in_4bit", "use_peft"}
    if "report_to" in upper:
        dropped |= {"use_wandb", "use_tensorboard"}
    if "tokenizer" in given and upper["tokenizer"] != lower.get("tokenizer", default_of("tokenizer")):
        # The size belongs to the tokenizer it was chosen for; only another trained BPE can have it as well.
        dropped |= {"vocab_size"} if upper["tokenizer"] != "bpe" else set()
    return (
        dropped | _displaced_idle(lower, upper) | _displaced_batch(lower, upper, given) | _displaced_shape(lower, upper)
    )


def _displaced_idle(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> set[str]:
    """Names what would do nothing any more once the upper layer has switched it off."""
    values = {key: default_of(key) for key in FIELDS} | dict(lower) | dict(upper)
    return {
        key
        for dependence in DEPENDENCES
        if set(dependence.switches) & set(upper) and not dependence.holds(values)
        for key in dependence.keys
    }


def _displaced_batch(lower: Mapping[str, Any], upper: Mapping[str, Any], given: set[str]) -> set[str]:
    """The effective batch changes only when the upper layer says so: by a total, or by both of its factors."""
    if given & set(TOTAL_BATCH_KEYS):
        return {_ACCUMULATION} | ({_MICRO} if _micro_contradicts(lower, upper) else set())
    if not any(is_given(lower.get(key)) for key in TOTAL_BATCH_KEYS):
        return set()
    if {_MICRO, _ACCUMULATION} <= given:
        return set(TOTAL_BATCH_KEYS)
    if _MICRO in given:
        return {_ACCUMULATION}
    return {_MICRO} if _ACCUMULATION in given else set()


def _micro_contradicts(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> bool:
    micro, accumulation = lower.get(_MICRO, "auto"), upper.get(_ACCUMULATION, "auto")
    if micro == "auto":
        return False
    total = upper.get("total_batch_size")
    if not is_given(total):
        length = upper.get("max_seq_length", lower.get("max_seq_length", default_of("max_seq_length")))
        total = upper["total_batch_tokens"] // length
    return bool(micro > total or (accumulation != "auto" and micro * accumulation != total))


def _displaced_shape(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> set[str]:
    settings = upper.get(MODEL_CONFIG)
    if not settings:
        return set()
    if _is_another_model(lower.get(MODEL_CONFIG), settings):
        return set(SHAPE_KEYS)
    return {find_key(name) for name in settings} & set(SHAPE_KEYS)


def _merge_model_config(lower: Mapping[str, Any], upper: Mapping[str, Any], problems: list[str]) -> Any:
    below, above = lower.get(MODEL_CONFIG), upper.get(MODEL_CONFIG)
    if above and _is_another_model(below, above):
        return above
    if isinstance(below, str):
        if above:
            problems.append(f"model_config {show(above)} cannot change single settings of {below}: give model_type too")
        return below
    shapes = {key for key in SHAPE_KEYS if is_given(upper.get(key))}
    kept = {name: value for name, value in (below or {}).items() if find_key(name) not in shapes}
    return kept | (above or {})


def _is_another_model(below: Any, above: Any) -> bool:
    """A path replaces everything before it, and so does another architecture."""
    if isinstance(above, str):
        return True
    if isinstance(below, str):
        return "model_type" in above
    return "model_type" in above and above["model_type"] != (below or {}).get("model_type")


def _settle_min_lr(settled: dict[str, Any], problems: list[str]) -> None:
    lowest = settled.pop("min_lr", None)
    if lowest is None:
        return
    peak = settled.get("learning_rate", default_of("learning_rate"))
    if 0 <= lowest < peak:
        settled["min_lr_ratio"] = lowest / peak
    else:
        problems.append(
            f"min_lr is {lowest}, but takes a number from 0 to below learning_rate {peak}; "
            "for a rate that never falls set lr_scheduler_type to constant"
        )


def _settle_precision(settled: dict[str, Any]) -> None:
    """As in transformers, `fp16: false` without another choice means fp32; beside a choice it says nothing."""
    switches = {name: settled.pop(name) for name in PRECISIONS if name in settled}
    precision = settled.get("precision", "auto")
    for name, wanted in switches.items():
        if wanted:
            settled["precision"] = name
            return
    if precision == "fp32" and "fp32" in switches:
        settled["precision"] = "auto"
    elif precision in switches or (precision == "auto" and {"fp16", "bf16"} & set(switches)):
        settled["precision"] = "fp32"
