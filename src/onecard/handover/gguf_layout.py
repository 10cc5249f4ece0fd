"""A model of transformers in the words of GGUF: architecture, numbers, tensors.

llama.cpp rotates neighbouring values of a Llama head, transformers values that lie half a head apart, so the rows of
query and key are put in another order:

    transformers  a0 a1 a2 b0 b1 b2   (a_i and b_i are rotated together)
    llama.cpp     a0 b0 a1 b1 a2 b2

GPT-2's layers keep their weight as [in, out]; GGUF has [out, in] throughout.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from onecard.errors import InputError

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gpt2": "GPT2"}
# What each architecture of llama.cpp computes between its matrices (src/models/*.cpp).
_ACTIVATIONS = {"gpt2": ("gelu_new", "gelu_pytorch_tanh")}
_GPT2_AS_TRAINED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def load_gguf() -> Any:
    """Imports the `gguf` package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise InputError(
            f"--to gguf needs the package gguf, which cannot be loaded here ({error}): pip install 'onecard[gguf]'"
        ) from error


@dataclass(frozen=True)
class Placement:
    """Where a weight goes: its name in the file, and how it lies there (`plain`, `transposed`, or heads to rotate)."""

    name: str
    arrangement: str = "plain"
    num_heads: int = 0

    def to_file(self, weight: Tensor) -> Tensor:
        """Arranges a weight of transformers for the file."""
        if self.arrangement == "transposed":
            return weight.T.contiguous()
        if self.arrangement == "rotated":
            return weight.unflatten(0, (self.num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        return weight

    def from_file(self, weight: Tensor) -> Tensor:
        """Arranges a weight of the file for transformers."""
        if self.arrangement == "transposed":
            return weight.T.contiguous()
        if self.arrangement == "rotated":
            return weight.unflatten(0, (self.num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
        return weight

    @property
    def block_dim(self) -> int:
        """The dimension of transformers' weight along which the rows of the file run."""
        return 0 if self.arrangement == "transposed" else -1


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuses models that llama.cpp would compute otherwise.

    Raises:
        InputError: an architecture or settings that have no GGUF form here; all of them together.
    """
    if problems := list(_problems(config)):
        raise InputError("\n".join([*problems, "Export it with --to hf, which any model can be"]))


def _problems(config: PreTrainedConfig) -> Iterator[str]:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        yield f"--to gguf: a {kind} cannot be written; these can: {', '.join(ARCHITECTURES)}"
        return
    activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", "silu")
    if activation not in _ACTIVATIONS.get(kind, ("silu", "swish")):
        yield f"--to gguf: llama.cpp's {kind} computes {_ACTIVATIONS.get(kind, ('silu',))[0]}, this one {activation}"
    if kind == "gpt2":
        for name, value in _GPT2_AS_TRAINED.items():
            if getattr(config, name, value) != value:
                yield f"--to gguf: llama.cpp's gpt2 knows no {name} {not value}"
        return
    if getattr(config, "use_sliding_window", False):
        yield f"--to gguf: llama.cpp's {kind} attends to all tokens, this one to a sliding window"
    rope = _rope(config)
    known = ("default", "linear", "llama3") if kind == "llama" else ("default", "linear")
    if rope["rope_type"] not in known:
        yield f"--to gguf: rotary positions of type {rope['rope_type']} cannot be written, only {', '.join(known)}"


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    return {"rope_type": "default"} | dict(getattr(config, "rope_parameters", None) or {})


def head_size(config: PreTrainedConfig) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def place_weights(model: PreTrainedModel) -> dict[str, Placement]:
    """Says where each parameter of a model goes, by its name in transformers; a tied head goes nowhere.

    Raises:
        InputError: a parameter that GGUF has no name for.
    """
    gguf, config = load_gguf(), model.config
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    placements, unnamed = {}, []
    for name, parameter in model.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            unnamed.append(name)
            continue
        placements[name] = Placement(found, *_arrangement(config, name, parameter))
    if unnamed:
        raise InputError(f"--to gguf: a {config.model_type} in GGUF has no place for {', '.join(unnamed[:3])}")
    return placements


def _arrangement(config: PreTrainedConfig, name: str, parameter: Tensor) -> tuple[str, int]:
    if config.model_type == "gpt2" and parameter.ndim == 2 and ".h." in name:
        return "transposed", 0
    if config.model_type == "llama" and ".q_proj." in name:
        return "rotated", config.num_attention_heads
    if config.model_type == "llama" and ".k_proj." in name:
        return "rotated", config.num_key_value_heads
    return "plain", 0


def add_numbers(writer: Any, config: PreTrainedConfig, num_rows: int) -> None:
    """Adds what llama.cpp must know of a model beside its tensors; `num_rows` is the height of the embedding."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(num_rows)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(load_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rotary_factors(model: PreTrainedModel) -> Tensor | None:
    """What Llama 3 divides each rotary frequency by, [head / 2]; None where frequencies are the plain ones."""
    if _rope(model.config)["rope_type"] != "llama3":
        return None
    size, theta = head_size(model.config), float(_rope(model.config)["rope_theta"])
    plain = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    frequencies = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    return plain / frequencies.float().cpu()
