"""The model of a run that starts from an existing one: its shape, from wherever it is known."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from onecard.errors import InputError
from onecard.model.build import count_parameters
from onecard.model.hub import find_base, find_cached
from onecard.model.pretrained import make_pretrained_config, read_settings
from onecard.model.untrained import find_untrained
from onecard.model.weight_files import fingerprint
from onecard.planner.known_models import find_known_model
from onecard.planner.shape import DROPOUT_WORDS, OF_A_CHECKPOINT, blaming_config
from onecard.spec import BasePlan, CorpusFacts, ModelPlan, Recipe

DEFAULT_LENGTH: int = Recipe.model_fields["max_seq_length"].default
# More than any chat template brings; beyond it the tokenizer is another model's.
_MOST_NEW_TOKENS = 1024
_STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# Of what describes a checkpoint, what shapes it, too.
_KEPT = {"vocab_size", "max_position_embeddings", "n_positions", "bos_token_id", "eos_token_id", "pad_token_id"}


def plan_base(
    name: str,
    *,
    max_seq_length: int,
    vocab_size: int | None = None,
    dropout: float | None = None,
    reasons: dict[str, str],
) -> ModelPlan:
    """Plans a run that starts from a model by folder or name, without downloading its weights.

    Its shape comes from its folder or the cache, else from what the package knows, else from its config on the Hub.
    Only a plan made while the weights are here can be trained: call `find_base` first. `vocab_size` is the
    tokenizer's: new tokens get rows of their own, and nothing is padded. Fine-tuning drops nothing unless `dropout` is
    given.

    Raises:
        InputError: no such model, none that can be trained, more tokens than it has positions, or another tokenizer.
    """
    found = _find(name)
    config = make_pretrained_config(found.settings, 0.0, name)
    settings = _shape_of(config)
    _check_length(name, config, max_seq_length)
    if max_seq_length == (positions := _positions(config)) and positions < DEFAULT_LENGTH:
        reasons["max_seq_length"] = f"all positions that {name} has; the default of {DEFAULT_LENGTH} is more"
    num_new = _count_new_tokens(name, config.vocab_size, vocab_size or 0)
    if num_new:
        settings["vocab_size"] = vocab_size
        reasons["model.settings.vocab_size"] = f"{config.vocab_size} tokens of {name} and {num_new} new ones"
    with blaming_config(settings):
        total, matrices = count_parameters(settings)
    reasons["model.base.name"] = found.reason
    if dropout is None and (own := _own_dropout(found.settings)):
        reasons["model.dropout"] = f"none while fine-tuning, though the model's config says {own:g}; dropout sets it"
    base = BasePlan(
        name=name,
        folder=str(found.folder) if found.folder else None,
        fingerprint=found.fingerprint,
        num_new_tokens=num_new,
        download_bytes=total * found.bytes_per_parameter if found.download_bytes is None else found.download_bytes,
    )
    return ModelPlan(
        settings=settings,
        dropout=dropout or 0.0,
        init="pretrained",
        num_parameters=total,
        num_matrix_parameters=matrices,
        base=base,
    )


def find_positions(name: str) -> int | None:
    """Finds how many positions a model has, from wherever its config is known; None where any number will do.

    Raises:
        InputError: no such model, or none that can be trained.
        CheckpointError: its config is damaged.
    """
    return _positions(make_pretrained_config(_find(name).settings, 0.0, name))


def learn_control_tokens(model: ModelPlan, corpus: CorpusFacts, reasons: dict[str, str]) -> ModelPlan:
    """Lets the rows of tokens that the chat template writes and the base never learned move beside adapters.

    Nothing else of embedding and head does, so that a stop token among them could not be learned. A vocabulary that was
    padded has rows for new tokens, too.

    Raises:
        CheckpointError: the weights are damaged.
    """
    base = model.base
    if base is None or base.folder is None or not corpus.control_tokens:
        return model
    own = model.settings["vocab_size"] - base.num_new_tokens
    ids = dict(corpus.control_tokens)
    init_std = float(model.settings.get("initializer_range", 0.02))
    signs = find_untrained(Path(base.folder), list(ids.values()), vocab_size=own, init_std=init_std)
    signs |= {ids[name]: "it is new" for name in corpus.new_tokens if ids.get(name, own) < own}
    if not signs:
        return model
    named = [f"{name} ({signs[token]})" for name, token in ids.items() if token in signs]
    reasons["model.base.untrained_tokens"] = (
        f"{', '.join(named)}: in the chat template and not trained in {base.name}, so learned beside the adapters"
    )
    base = base.model_copy(update={"untrained_tokens": tuple(sorted(signs))})
    return model.model_copy(update={"base": base})


@dataclass(frozen=True)
class _Found:
    """A model's settings and where they are from; `download_bytes` is what has yet to come, None where unknown."""

    settings: dict[str, Any]
    reason: str
    dtype: str
    folder: Path | None = None
    fingerprint: str | None = None
    download_bytes: int | None = None

    @property
    def bytes_per_parameter(self) -> int:
        return _STORED_BYTES.get(self.dtype, 4)


def _find(name: str) -> _Found:
    folder = find_cached(name, weights=False)
    if folder is None and (known := find_known_model(name)) is not None:
        return _Found(
            known.settings, f"as onecard knows it ({known.source})", known.dtype, download_bytes=known.download_bytes
        )
    folder = folder or find_base(name, weights=False)
    settings = read_settings(folder)
    dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
    if find_cached(name) is None:
        return _Found(settings, f"config.json in {folder}; its weights are not here yet", dtype)
    return _Found(settings, f"found in {folder}", dtype, folder, fingerprint(folder), 0)


def _shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What the config says beyond its family's defaults and shapes the model, under the names transformers knows."""
    known = AutoConfig.for_model(config.model_type)
    allowed = set(known.to_dict()) | set(known.attribute_map)
    described = OF_A_CHECKPOINT - _KEPT | {"id2label", "label2id"}
    own = config.to_diff_dict()
    return (
        {"model_type": config.model_type}
        | {
            key: value
            for key, value in own.items()
            if key in allowed and key not in described and not any(word in key for word in DROPOUT_WORDS)
        }
        | {"vocab_size": config.vocab_size}
    )


def _own_dropout(settings: dict[str, Any]) -> float:
    config = type(AutoConfig.for_model(settings["model_type"])).from_dict(dict(settings))
    values = [value for key, value in config.to_dict().items() if any(word in key for word in DROPOUT_WORDS)]
    return max((float(value) for value in values if isinstance(value, int | float)), default=0.0)


def _count_new_tokens(name: str, own: int, needed: int) -> int:
    num_new = max(0, needed - own)
    if num_new > _MOST_NEW_TOKENS:
        raise InputError(
            f"the tokenizer has {needed} tokens and {name} {own}: that is the tokenizer of another model. Leave "
            "tokenizer out, so that the model's own is used"
        )
    return num_new


def _positions(config: PreTrainedConfig) -> int | None:
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def _check_length(name: str, config: PreTrainedConfig, max_seq_length: int) -> None:
    positions = _positions(config)
    if positions is not None and max_seq_length > positions:
        raise InputError(
            f"max_seq_length {max_seq_length} is more than the {positions} positions of {name}: set it to {positions} "
            "or less"
        )
