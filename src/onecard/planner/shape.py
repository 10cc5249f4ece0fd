"""The model of a run: the recipe's config completed by the corpus."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from onecard.errors import InputError, RecipeError
from onecard.model.adapt import count_trained
from onecard.model.build import DOCUMENT_START, count_parameters, make_config
from onecard.model.families import carries_state
from onecard.model.loss import usual_chunk_size
from onecard.spec import AdaptPlan, CorpusFacts, ModelPlan, Recipe
from onecard.spec.agreement import SHAPE_KEYS
from onecard.spec.layers import find_config_problems
from onecard.spec.paths import is_hub_name, locate
from onecard.units import format_bytes

# Qwen3's own defaults are those of a 7B model.
_DEFAULT_MODEL = {
    "model_type": "qwen3",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "head_dim": 64,
    "intermediate_size": 1024,
    "tie_word_embeddings": True,
}
DROPOUT_WORDS = ("dropout", "pdrop")
# Padding 50,257 to 50,304 gave 112K -> 127K tokens/s on an A100 (rasbt/LLMs-from-scratch, ch05/10).
_VOCAB_MULTIPLE = 64
_VOCAB_TO_PAD = 1024


def plan_model(recipe: Recipe, corpus: CorpusFacts, reasons: dict[str, str]) -> ModelPlan:
    """Completes the config of a model from scratch with vocabulary, length and special tokens of the corpus.

    Raises:
        InputError: settings contradict each other or the architecture; all of its problems together.
    """
    settings = _given_settings(recipe)
    dropout = _take_dropout(settings, recipe)
    settings |= {key: value for key in SHAPE_KEYS if (value := getattr(recipe, key)) is not None}
    if problems := find_config_problems(settings):
        raise RecipeError(f"recipe {recipe.name}", problems)
    settings["vocab_size"] = _vocabulary(settings.get("vocab_size"), corpus, reasons)
    settings |= {"bos_token_id": corpus.separator_id, "eos_token_id": corpus.separator_id, "pad_token_id": None}
    with blaming_config(settings):
        settings = _with_rope_parameters(settings)
        settings |= _positions(settings, recipe)
        config = make_config(settings, dropout)
        _check_heads(config, settings)
        total, matrices = count_parameters(settings)
    return ModelPlan(
        settings=settings,
        dropout=dropout,
        init=recipe.init,
        num_parameters=total,
        num_matrix_parameters=matrices,
    )


def plan_adapters(recipe: Recipe) -> AdaptPlan | None:
    """The adapters of a recipe; None where all weights move."""
    if recipe.method == "full":
        return None
    return AdaptPlan(
        method=recipe.method,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules,
        bias=recipe.lora_bias,
        double_quant=recipe.double_quant,
    )


def count_adapters(model: ModelPlan, adapt: AdaptPlan) -> int:
    """Counts the parameters that move beside a model's frozen weights.

    Raises:
        InputError: names that match no layer, or a rank beyond a layer's width; all problems together.
    """
    return count_trained(json.dumps(model.settings), adapt.model_dump_json(), len(model.learned_tokens))


def attention_width(settings: dict[str, Any]) -> tuple[int, int]:
    """Number of layers with attention and width of all query heads together, for counting attention's arithmetic."""
    config = make_config(settings)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    num_layers = config.num_hidden_layers
    if kinds:
        num_layers = sum("attention" in kind and "linear" not in kind for kind in map(str, kinds))
    num_heads = getattr(config, "num_attention_heads", None)
    if not num_heads:
        return 0, 0
    head_width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return num_layers, num_heads * head_width


def choose_loss_chunk(
    recipe: Recipe, model: ModelPlan, device_kind: str, reasons: dict[str, str]
) -> int | Literal["full"]:
    """Resolves `loss_chunk_size` to a number of tokens, or to all of a micro-batch."""
    if recipe.loss_chunk_size != "auto":
        return recipe.loss_chunk_size
    size = usual_loss_chunk(model, device_kind)
    logits = format_bytes(4 * size * make_config(model.settings).vocab_size)
    reasons["loss_chunk_size"] = f"tokens whose logits exist at once: {logits} keep the device busy"
    return size


def usual_loss_chunk(model: ModelPlan, device_kind: str) -> int:
    """Tokens whose logits the loss of a model takes at once where nothing else is asked for."""
    config = make_config(model.settings)
    return usual_chunk_size(config.vocab_size, config.hidden_size, device_kind)


def _given_settings(recipe: Recipe) -> dict[str, Any]:
    if isinstance(recipe.model_settings, dict):
        return dict(recipe.model_settings or _DEFAULT_MODEL)
    name, path = recipe.model_settings, locate(recipe.model_settings)
    is_on_hub = path is None and is_hub_name(name) and not name.endswith(".json")
    settings = _fetch_config(name) if is_on_hub else _read_config(path or Path(name))
    # What describes a trained checkpoint, not an architecture; the corpus decides the vocabulary.
    return {key: value for key, value in settings.items() if key not in OF_A_CHECKPOINT}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        path = path / "config.json" if path.is_dir() else path
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"model_config {path} cannot be read as a config ({reason}): give a config.json of transformers, or "
            "a mapping with model_type"
        ) from error
    if not isinstance(settings, dict):
        raise InputError(f"model_config {path} holds a {type(settings).__name__}, but a config is a JSON object")
    return settings


def _fetch_config(name: str) -> dict[str, Any]:
    """Reads the config of a model on the Hugging Face Hub, or in its cache."""
    try:
        settings: dict[str, Any] = PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError) as error:
        raise InputError(
            f"model_config {name!r} is no file or folder (looked in {Path.cwd()}), and transformers cannot load it as "
            f"a model of the Hugging Face Hub: {str(error).strip().splitlines()[0]} Check the name, or be online once "
            "so that it gets into the cache"
        ) from error
    return {key: value for key, value in settings.items() if not key.startswith("_")}


@contextmanager
def blaming_config(settings: dict[str, Any]) -> Iterator[None]:
    """Blames the config for whatever transformers' classes raise over it: each architecture has errors of its own."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model_config: a model with model_type {settings.get('model_type')!r} and these settings cannot be built "
            f"({type(error).__name__}: {error}): try qwen3, llama or gpt2"
        ) from error


OF_A_CHECKPOINT = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "task_specific_params"),
    *("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", DOCUMENT_START),
}


def _take_dropout(settings: dict[str, Any], recipe: Recipe) -> float:
    """Removes dropout from the settings: it is one number, applied everywhere."""
    given = {key: settings.pop(key) for key in list(settings) if any(word in key for word in DROPOUT_WORDS)}
    values = {float(value) for value in given.values() if isinstance(value, int | float)}
    if wrong := {key: value for key, value in given.items() if not _is_share(value)}:
        raise InputError(f"model_config has {wrong}, but a dropout is a number of 0 or more and below 1")
    if recipe.dropout is not None:
        return recipe.dropout
    if len(values) > 1:
        raise InputError(
            f"model_config sets different dropouts ({', '.join(f'{k}: {v}' for k, v in given.items())}); "
            "onecard applies one everywhere: set `dropout` instead"
        )
    return values.pop() if values else 0.0


def _with_rope_parameters(settings: dict[str, Any]) -> dict[str, Any]:
    """Says what published configs call rope_theta and rope_scaling as transformers 5 does, by its own conversion."""
    older = {key: settings[key] for key in ("rope_theta", "rope_scaling") if key in settings}
    if not older or settings.get("model_type") not in CONFIG_MAPPING_NAMES:
        return settings
    parameters = getattr(AutoConfig.for_model(settings["model_type"], **older), "rope_parameters", None)
    if parameters is None:
        return settings
    return {key: value for key, value in settings.items() if key not in older} | {"rope_parameters": parameters}


def _is_share(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value < 1)


def _vocabulary(given: int | None, corpus: CorpusFacts, reasons: dict[str, str]) -> int:
    needed = corpus.vocab_size
    if given is not None and given < needed:
        raise InputError(
            f"model_config says vocab_size {given}, but the tokenizer has {needed} tokens: leave it out of model_config"
        )
    if given is not None:
        return given
    if needed < _VOCAB_TO_PAD or needed % _VOCAB_MULTIPLE == 0:
        return needed
    padded = -(-needed // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    reasons["model.settings.vocab_size"] = f"{needed} tokens, padded to {padded} for speed"
    return padded


def _positions(settings: dict[str, Any], recipe: Recipe) -> dict[str, int]:
    """Gives the length as the config calls it; nothing for architectures without a table or range of positions."""
    given = settings.get("max_position_embeddings", settings.pop("n_positions", None))
    if given is not None and given < recipe.max_seq_length:
        raise InputError(f"max_seq_length {recipe.max_seq_length} is more than the model's {given} positions: lower it")
    if not hasattr(make_config(settings), "max_position_embeddings"):
        return {}
    return {"max_position_embeddings": int(given or recipe.max_seq_length)}


def _has_own_head_width(config: Any) -> bool:
    """Whether the width of a head is a setting: of some it follows from others (Falcon, DeepSeek)."""
    is_derived = isinstance(getattr(type(config), "head_dim", None), property) or hasattr(config, "qk_rope_head_dim")
    return getattr(config, "head_dim", None) is not None and not is_derived


def _check_heads(config: Any, settings: dict[str, Any]) -> None:
    problems = []
    if config.is_encoder_decoder:
        raise InputError(f"model_config: {config.model_type} has an encoder too: try qwen3, llama or gpt2")
    heads, kv_heads = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if not heads or carries_state(config):
        return  # a family without attention, or with heads of several kinds, checks its own sizes
    # Qwen3's own defaults (32 key-value heads, head width 128) are for its published sizes; a small model means these.
    if kv_heads and "num_key_value_heads" not in settings:
        settings["num_key_value_heads"] = kv_heads = heads
    if "head_dim" not in settings and _has_own_head_width(config) and config.hidden_size % heads == 0:
        settings["head_dim"] = config.hidden_size // heads
    if "head_dim" not in settings and config.hidden_size % heads:
        problems.append(f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}")
    if kv_heads and heads % kv_heads:
        problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if settings.get("head_dim", 2) % 2:
        problems.append(f"the head width {settings['head_dim']} is odd: rotary positions need an even one")
    if problems:
        raise InputError("model_config: " + "; ".join(problems))
