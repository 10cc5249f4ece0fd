"""Ids in, hidden states out."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from onecard.model.attention import DocumentBorders


class CompilerError(Exception):
    """torch.compile failed; the model is untouched and runs without it."""


class Decoder:
    """Calls a model's decoder without its head, compiled or not.

    The model itself stays uncompiled, so that its parameters keep their names. `to_eager` is the way back where the
    compiler fails; `failure` then says why.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool) -> None:
        self._plain = model.base_model
        self._between = _find_between(model)
        self._embeddings = model.get_input_embeddings()
        self._call = torch.compile(self._plain, dynamic=False) if compiled else self._plain
        self.is_compiled = compiled
        self.failure: str | None = None

    def to_eager(self, failure: str | None = None) -> None:
        """Stops using the compiler."""
        self.failure = failure
        self._call = self._plain
        self.is_compiled = False

    def compile_each(self, layers: Iterable[nn.Module]) -> None:
        """Compiles each layer by itself, where something happens between them that the compiler cannot look into."""
        self._call = self._plain
        for layer in layers:
            layer.compile(dynamic=False)

    def watch_calls(self, watched: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Lets what is called, compiled or not, be wrapped by who measures it."""
        self._call = watched(self._call)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Gives the parameters of the decoder, compiled or not."""
        return self._plain.parameters()

    def __call__(self, ids_BT: Tensor, borders: DocumentBorders | None) -> Tensor:
        """Gives hidden states [B * T, D] for ids [B, T].

        Raises:
            CompilerError: the compiler failed.
        """
        if borders is not None and borders.apart is not None:
            return self._run_apart(ids_BT, borders.apart)
        keywords = {} if borders is None else borders.as_keywords()
        hidden_BTD: Tensor = self._forward(input_ids=ids_BT, use_cache=False, **keywords).last_hidden_state
        if self._between is not None:
            hidden_BTD = self._between(hidden_BTD)
        # Mamba adds up its layers in fp32, whatever the type of its weights.
        return hidden_BTD.flatten(0, 1).to(self._embeddings.weight.dtype)

    def _run_apart(self, ids_BT: Tensor, lengths: tuple[tuple[int, ...], ...]) -> Tensor:
        """Runs each document by itself, for decoders that cannot be told where one begins."""
        documents = [ids_T for row, ends in zip(ids_BT, lengths, strict=True) for ids_T in row.split(ends)]
        return torch.cat([self(ids_T[None], None) for ids_T in documents])

    def _forward(self, **keywords: Any) -> Any:
        if not self.is_compiled:
            return self._call(**keywords)
        try:
            return self._call(**keywords)
        except TorchDynamoException as error:
            raise CompilerError(str(error)) from error


def _find_between(model: PreTrainedModel) -> nn.Module | None:
    """The one module between decoder and output projection, of families that have one (ModernBERT's decoder)."""
    others = [part for part in model.children() if part not in (model.base_model, model.get_output_embeddings())]
    return others[0] if len(others) == 1 else None
