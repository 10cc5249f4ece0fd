"""Bytes that an operator moves between a card and its memory, and the operations it computes."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

# Written without being read, whatever tensor they are modelled on or handed.
_FILLS = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "zero_", "fill_")
_COPIES = ("copy_", "_foreach_copy_")
# Touch as many elements of the first tensor as they give.
_LOOKUPS = ("gather", "embedding", "index", "index_select", "nll_loss_forward")
# Add into a few places of the first tensor.
_SCATTERS = ("scatter_add_", "index_add_", "scatter_")


def count_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Operations by PyTorch's own formulas; those in place are counted as their likes out of place."""
    name = func.overloadpacket.__name__
    likewise = getattr(torch.ops.aten, name.removesuffix("_"), None)
    formula = flop_registry.get(func.overloadpacket) or flop_registry.get(likewise)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors of an operator's arguments or results, which nest in lists only: PyTorch's trees take far longer."""
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    if isinstance(values, list | tuple):
        for value in values:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, list | tuple):
                found += tensors_in(value)
    return found


def written_inputs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors, alone or in lists, that an operator changes in place."""
    found: list[Tensor] = []
    for position, name in _written_places(func):
        found += tensors_in(kwargs.get(name, args[position] if position < len(args) else None))
    return found


@cache
def _written_places(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operator changes in place."""
    arguments = enumerate(func._schema.arguments)
    return [(place, one.name) for place, one in arguments if one.alias_info is not None and one.alias_info.is_write]


def only_reserves(func: Any) -> bool:
    """Whether an operator never computes anything: a view, or memory that is only reserved."""
    return func.is_view or "empty" in func.overloadpacket.__name__


def is_free(inputs: list[Tensor], outputs: list[Tensor], written: list[Tensor]) -> bool:
    """Whether nothing was computed: all that came out is memory that went in."""
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return not written and all(tensor.untyped_storage()._cdata in known for tensor in outputs)


def count_bytes(name: str, inputs: list[Tensor], outputs: list[Tensor], written: list[Tensor]) -> int:
    """Bytes read and written, each tensor once: what caches save or lose is left to efficiencies."""
    targets = {id(tensor) for tensor in written}
    results = outputs if outputs else written
    if name in _FILLS:
        return sum(map(_size, results))
    if name in _COPIES:
        return sum(_size(tensor) for tensor in inputs if id(tensor) not in targets) + sum(map(_size, written))
    if name in _LOOKUPS:
        return 2 * sum(map(_size, outputs)) + sum(map(_size, inputs[1:2]))
    if name in _SCATTERS:
        return 3 * sum(_size(tensor) for tensor in inputs[1:])
    if name == "nll_loss_backward":
        return sum(map(_size, outputs))
    return sum(map(_size, inputs)) + sum(map(_size, results))


def _size(tensor: Tensor) -> int:
    # An expanded tensor has fewer bytes than elements would need.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
