"""Which weights move, and how the frozen ones rest.

full     all weights move
lora     adapters move; the weights rest as they are
qlora    adapters move; linear layers rest in 4 bits (NF4), embeddings, norms and head as they are
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onecard.errors import InputError
from onecard.model.build import build_shape
from onecard.model.new_tokens import train_tokens
from onecard.model.nf4 import NF4Linear, find_linears, load_operators
from onecard.spec import AdaptPlan


def adapt(
    model: PreTrainedModel,
    plan: AdaptPlan | None,
    *,
    seed: int,
    device: torch.device | None = None,
    tokens: Sequence[int] = (),
) -> None:
    """Freezes, quantizes and injects in place as the plan says; without a plan, all weights move.

    Adapters depend on `seed` alone. Layers are quantized on `device`, one after the other, and stay there; everything
    else stays where it is. Beside adapters the rows of `tokens` move.

    Raises:
        InputError: names that match no layer, a rank beyond a layer's width, or bitsandbytes missing; all problems of
            the adapters together.
    """
    if plan is None:
        return
    linears = find_linears(model)
    names = list(_find_targets(model, linears, plan))
    if plan.method == "qlora":
        load_operators()
        while linears:  # each whole weight is let go before the next is read
            name, module = linears.popitem()
            quantized = NF4Linear.from_linear(module, double_quant=plan.double_quant, device=device)
            del module
            model.set_submodule(name, quantized)
    from onecard.model.lora import inject  # PEFT takes a second to import, which pretraining need not wait for

    inject(model, plan, {name: model.get_submodule(name) for name in names}, seed)
    if tokens:
        train_tokens(model, tokens)


@cache
def count_trained(settings_json: str, plan_json: str, num_tokens: int) -> int:
    """Counts the parameters that `adapt` lets move in a model of these settings, without building its weights.

    Texts, so that equal questions are answered at once: a plan asks for each of its alternatives.
    """
    plan = AdaptPlan.model_validate_json(plan_json)
    with torch.device("meta"):
        model = build_shape(json.loads(settings_json))
        adapt(model, plan.model_copy(update={"method": "lora"}), seed=0, tokens=range(num_tokens))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _find_targets(
    model: PreTrainedModel, linears: dict[str, nn.Linear | Conv1D], plan: AdaptPlan
) -> dict[str, nn.Linear | Conv1D]:
    if plan.target_modules == "all-linear":
        targets = linears
        problems = [] if linears else [f"{type(model).__name__} has no linear layers to adapt: use method full"]
    else:
        targets = {name: module for name, module in linears.items() if _is_named(name, plan.target_modules)}
        problems = [
            _unmatched(model, linears, given)
            for given in plan.target_modules
            if not any(_is_named(name, [given]) for name in linears)
        ]
        if not plan.target_modules:
            problems.append("target_modules is empty, so nothing would train: name layers, or use all-linear")
    problems += _too_narrow(targets, plan.r)
    if problems:
        raise InputError("; ".join(problems))
    return targets


def _is_named(name: str, given: Iterable[str]) -> bool:
    """PEFT's rule: the whole name or its last parts."""
    return any(name == words or name.endswith(f".{words}") for words in given)


def _unmatched(model: PreTrainedModel, linears: Iterable[str], given: str) -> str:
    if any(_is_named(name, [given]) for name, _ in model.named_modules()):
        return (
            f"target_modules: {given!r} is no linear layer inside {type(model).__name__}: adapters go beside the "
            "linear layers of its blocks, not beside head, embeddings or whole blocks"
        )
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    nearest = difflib.get_close_matches(given, known, n=3, cutoff=0.4) or known
    return (
        f"target_modules: {given!r} matches no layer of {type(model).__name__}: "
        f"{'the nearest names are' if nearest != known else 'it has'} {', '.join(nearest)}"
    )


def _too_narrow(targets: dict[str, nn.Linear | Conv1D], r: int) -> list[str]:
    narrow = {name: min(module.weight.shape) for name, module in targets.items() if min(module.weight.shape) < r}
    if not narrow:
        return []
    name = min(narrow, key=narrow.__getitem__)
    return [
        f"r {r} is more than the {narrow[name]} rows or columns of {name}, so part of its adapter could never matter: "
        f"set r to {narrow[name]} or less, or leave {name.rsplit('.', 1)[-1]} out of target_modules"
    ]
