"""Which families of transformers can be trained, and by which attention.

sdpa     the family follows transformers' attention interface, and PyTorch's kernels compute what it asks for
eager    it asks for more (a softcap, sinks), or computes in code of its own that takes a mask and positions
apart    it derives positions by itself (ALiBi of Bloom and MPT), or hands a state from token to token (Mamba, Jamba,
         LFM2): documents run one at a time, by its own code
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from onecard.errors import InputError

# Their layers follow the interface, but do not hand on what is said about borders; a mask they do.
_KEEPING_KEYWORDS = ("nemotron", "stablelm")
# Without kernels of their own, their recurrence is a loop over tokens in Python.
_LOOPING = ("falcon_mamba", "jamba", "mamba", "recurrent_gemma", "rwkv", "zamba")

Backend = Literal["sdpa", "eager", "apart"]

PREFIX = "onecard_"
CHOOSE_CAUSAL = "Choose a causal language model such as gpt2, SmolLM2 or Qwen"


def find_backend(config: PreTrainedConfig) -> Backend:
    """Finds the attention that a family can be trained with: the first that keeps documents apart, fastest first."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    module = sys.modules[model_class.__module__]
    takes_positions = "position_ids" in inspect.signature(model_class.forward).parameters
    takes_mask = hasattr(module, "create_causal_mask") and not getattr(config, "alibi", False)
    if carries_state(config) or not (takes_positions and takes_mask):
        return "apart"
    if not follows_interface(config) or config.model_type in _KEEPING_KEYWORDS:
        return "eager"
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def implementation_of(config: PreTrainedConfig, backend: str) -> str:
    """Gives the name by which transformers knows a backend (`varlen` included) for models of this family."""
    if backend != "apart":
        return PREFIX + backend if follows_interface(config) else "eager"
    # What attention a hybrid has is plain; that of families which count positions by themselves is not.
    has_kernels = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", False)
    return "sdpa" if has_kernels and carries_state(config) else "eager"


def carries_state(config: PreTrainedConfig) -> bool:
    """Whether layers hand on more than attention sees: a recurrent state, or the last inputs of a convolution."""
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False):
        return True
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    return any("linear" in kind or not kind.endswith("attention") for kind in map(str, kinds))


def loops_over_tokens(model_type: str) -> bool:
    """Whether the family's code goes from token to token, rather than computing many at a time."""
    return model_type in _LOOPING


def follows_interface(config: PreTrainedConfig) -> bool:
    """Whether the attention is looked up among the registered ones, rather than in the family's own code."""
    return hasattr(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__], "ALL_ATTENTION_FUNCTIONS")


def explain_backend(config: PreTrainedConfig) -> str:
    """Says why a family needs more than PyTorch's kernels, and what that costs."""
    name = config.model_type
    if carries_state(config):
        return (
            f"{name} hands a state from token to token, so documents cannot share a row: chats get a row each and "
            "documents of text run one at a time, by its own code"
        )
    if find_backend(config) == "apart":
        return (
            f"{name} counts positions in code of its own, so documents cannot share a row: chats get a row each and "
            "documents of text run one at a time, by its own attention, which holds all scores"
        )
    if name in _KEEPING_KEYWORDS:
        return f"layers of {name} take borders of documents by a mask alone: its own attention, which holds all scores"
    if follows_interface(config):
        return f"{name} asks for more than PyTorch's kernels compute (a softcap or sinks): its own, with all scores"
    return f"{name} computes attention in code of its own, which holds all scores; a mask keeps documents apart"


def keep_weights(config: PreTrainedConfig) -> None:
    """Switches off what changes weights by itself: RWKV halves some for inference, and a checkpoint would keep that."""
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0


def refuse_family(config: PreTrainedConfig) -> None:
    """Refuses families that predict no next token from those before it.

    Raises:
        InputError: an encoder, alone or beside a decoder.
    """
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{name} has an encoder beside its decoder, which onecard cannot train: try qwen3, llama or gpt2"
        )
    if _is_encoder(config):
        raise InputError(
            f"{name} is an encoder: each of its tokens sees those after it, so it cannot learn to predict them. Choose "
            "a decoder, such as one of the Llama, Qwen or GPT-2 families"
        )


def _is_encoder(config: PreTrainedConfig) -> bool:
    if getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        return False
    module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]
    has_both = hasattr(config, "is_decoder") and hasattr(module, "create_bidirectional_mask")
    return has_both or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def find_foreign_kind(settings: Mapping[str, Any]) -> str | None:
    """Says why the architecture of a config.json is none that goes on with text; None where it is one, or not told."""
    model_type = settings.get("model_type")
    if model_type is None:
        return None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        return f"model_type {model_type!r} is unknown to transformers, or needs code of its own, which is never run"
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or settings.get("is_encoder_decoder"):
        return f"a {model_type} is no causal language model"
    return None
