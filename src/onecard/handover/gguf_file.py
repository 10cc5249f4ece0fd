"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) of models of transformers, and back."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.errors import CheckpointError
from onecard.handover.fidelity import Q8_BLOCK, TEXTS, refuse_other_weights
from onecard.handover.gguf_layout import (
    Placement,
    add_numbers,
    check_architecture,
    load_gguf,
    place_weights,
    rotary_factors,
)
from onecard.handover.gguf_tokens import Vocabulary, make_vocabulary
from onecard.handover.speech import Speech

_TYPES = {"f32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"f32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """A model to be written as one GGUF file, and read back.

    Raises:
        InputError: the package gguf is missing, or llama.cpp would compute or tokenize this model otherwise.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, speech: Speech, dtype: str) -> None:
        self._gguf = load_gguf()
        check_architecture(model.config)
        self._model, self._tokenizer, self._speech, self._dtype = model, tokenizer, speech, dtype
        self._vocabulary = make_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
        self._refuse_other_ids(self._vocabulary)
        self.num_unaligned = 0

    def write(self, path: Path, name: str) -> None:
        """Writes the weights in their type: vectors and positions in fp32, rows that make no whole blocks in fp16."""
        placements = place_weights(self._model)
        writer = self._gguf.GGUFWriter(path, self._model.config.model_type)
        self._add_metadata(writer, name)
        tensors = {placements[name]: tensor.detach() for name, tensor in self._model.named_parameters()}
        factors = rotary_factors(self._model)
        if factors is not None:
            tensors[Placement(_ROPE_FACTORS)] = factors
        types = {place: self._type_of(place, tensor) for place, tensor in tensors.items()}
        for place, tensor in tensors.items():
            shape = place.to_file(tensor.to("meta")).shape
            writer.add_tensor_info(place.name, *self._form(tuple(shape), types[place]), raw_dtype=types[place])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place, tensor in tensors.items():  # one after the other: never a second copy of the model
            values = place.to_file(tensor.float()).contiguous().numpy()
            writer.write_tensor_data(self._gguf.quants.quantize(values, types[place]))
        writer.close()

    def read_back(self, path: Path) -> None:
        """Puts what stands in the file in place of the model's own weights, after checking it against them.

        Raises:
            CheckpointError: other weights or other ids than were written.
        """
        reader = self._gguf.GGUFReader(path)
        self._refuse_other_ids(Vocabulary.read(reader))
        placements = place_weights(self._model)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        own = {name: parameter.detach() for name, parameter in self._model.named_parameters()}

        def read(name: str) -> Tensor:
            tensor = stored[placements[name].name]
            values = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            return placements[name].from_file(torch.from_numpy(values))

        refuse_other_weights(own, read, self._dtype, lambda name: placements[name].block_dim)
        for name, parameter in own.items():
            parameter.copy_(read(name))

    def _type_of(self, place: Placement, tensor: Tensor) -> Any:
        types = self._gguf.GGMLQuantizationType
        if tensor.ndim < 2 or place.name.startswith("position_embd"):
            return types.F32  # as llama.cpp's own files have them
        if self._dtype == "q8_0" and tensor.shape[place.block_dim] % Q8_BLOCK:
            self.num_unaligned += 1
            return types.F16
        return getattr(types, _TYPES[self._dtype])

    def _form(self, shape: tuple[int, ...], kind: Any) -> tuple[tuple[int, ...], Any, int]:
        """Shape, type and bytes of a tensor as the writer wants them: packed ones as bytes."""
        plain: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
        dtype = plain.get(kind.name, np.dtype(np.uint8))
        if dtype == np.uint8:
            shape = self._gguf.quants.quant_shape_to_byte_shape(shape, kind)
        return shape, dtype, int(np.prod(shape)) * dtype.itemsize

    def _add_metadata(self, writer: Any, name: str) -> None:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(getattr(self._gguf.LlamaFileType, _FILE_TYPES[self._dtype]))
        writer.add_quantization_version(self._gguf.GGML_QUANT_VERSION)
        add_numbers(writer, self._model.config, len(self._vocabulary.tokens))
        self._vocabulary.add_to(writer)
        speech = self._speech
        writer.add_add_bos_token(speech.opens_with_bos)
        writer.add_add_eos_token(False)
        writer.add_eos_token_id(speech.end_id)
        if speech.bos_id is not None:
            writer.add_bos_token_id(speech.bos_id)
        if speech.turn_end_id is not None:
            writer.add_eot_token_id(speech.turn_end_id)
        if self._tokenizer.unk_token_id is not None:
            writer.add_unk_token_id(self._tokenizer.unk_token_id)
        writer.add_pad_token_id(speech.pad_id)
        if isinstance(self._tokenizer.chat_template, str):
            writer.add_chat_template(self._tokenizer.chat_template)

    def _refuse_other_ids(self, vocabulary: Vocabulary) -> None:
        encode = vocabulary.encoder()
        for text in TEXTS:
            if encode(text) != self._tokenizer.encode(text, add_special_tokens=False):
                raise CheckpointError(
                    f"--to gguf: llama.cpp would cut this text into other tokens than the model has learned: {text!r}. "
                    "Export it with --to hf"
                )
