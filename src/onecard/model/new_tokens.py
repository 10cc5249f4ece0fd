"""Tokens that learn beside frozen weights: their rows of embedding and head move, the others rest.

    embedding  weight [V, D] frozen     rows [n, D] moving     n of the V tokens: new ones, and those never trained
    head       weight [V, D] frozen     rows, the embedding's own where the two are tied

Before the head's weight is used, the rows are written into it, so that logits need no second matrix; gradients go to
the rows alone. In files they are PEFT's `trainable_token_indices`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from onecard.errors import InputError


class GrownEmbedding(nn.Module):
    """An embedding of which some rows move: those of `tokens`."""

    places_V: Tensor

    def __init__(self, frozen: nn.Embedding, rows_ND: nn.Parameter, tokens: Sequence[int]) -> None:
        super().__init__()
        self.weight = frozen.weight
        self.padding_idx = frozen.padding_idx
        self.rows = rows_ND
        self.tokens = tuple(tokens)
        places_V = torch.full((frozen.weight.shape[0],), -1, dtype=torch.int32, device=frozen.weight.device)
        places_V[list(tokens)] = torch.arange(len(tokens), dtype=torch.int32, device=frozen.weight.device)
        self.register_buffer("places_V", places_V, persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        places_BT = self.places_V[ids_BT]
        moving_BTD = F.embedding(places_BT.clamp(min=0), self.rows)
        return torch.where((places_BT >= 0)[..., None], moving_BTD, F.embedding(ids_BT, self.weight))


class GrownHead(nn.Linear):
    """An output projection of which some rows move: those of `tokens`, which `tokens_N` has on the device."""

    tokens_N: Tensor

    def __init__(self, frozen: nn.Linear, rows_ND: nn.Parameter, tokens: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight, self.bias, self.rows = frozen.weight, frozen.bias, rows_ND
        self.tokens = tuple(tokens)
        self.register_buffer("tokens_N", torch.tensor(tokens, device=frozen.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        write_rows(self.weight, self.rows, self.tokens_N)
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def add_tokens(model: PreTrainedModel, num_new: int) -> None:
    """Extends embedding and head by rows that are the mean of the others.

    The vocabulary is not padded further: plain PEFT and other tools resize to the same size.
    """
    if num_new == 0:
        return
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(old + num_new, mean_resizing=False)
    matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in matrices.values():
        weight[old:] = weight[:old].float().mean(0).to(weight.dtype)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.bias is not None:
        head.bias[old:] = head.bias[:old].mean()


@torch.no_grad()
def write_rows(weight_VD: Tensor, rows_ND: Tensor | None, tokens_N: Tensor | None) -> None:
    """Writes what has moved into the matrix it belongs to."""
    if rows_ND is not None and tokens_N is not None:
        weight_VD.index_copy_(0, tokens_N, rows_ND.to(weight_VD.dtype))


def train_tokens(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Lets the rows of some tokens move, in fp32; nothing else changes.

    Raises:
        InputError: embedding or head of this architecture do more than look up and multiply.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise InputError(
            f"tokens that are new or were never trained cannot learn beside adapters in a {model.config.model_type}, "
            f"whose embedding is a {type(embedding).__name__}: use method full, or a chat template without such tokens"
        )
    rows = _rows_of(embedding.weight, tokens)
    is_tied = head.weight is embedding.weight
    model.set_input_embeddings(GrownEmbedding(embedding, rows, tokens))
    model.set_output_embeddings(GrownHead(head, rows if is_tied else _rows_of(head.weight, tokens), tokens))


def _rows_of(weight_VD: Tensor, tokens: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(weight_VD.detach()[list(tokens)].float())


@torch.no_grad()
def place_tokens(model: PreTrainedModel, tokens: dict[str, list[int]] | list[int], rows: dict[str, Tensor]) -> None:
    """Writes trained rows into a plain model, which grows where it lacks the tokens.

    `tokens` is PEFT's `trainable_token_indices`; `rows` holds tensors by the name of their module, and is emptied.

    Raises:
        KeyError: a matrix or its rows are missing.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding = names[model.get_input_embeddings()]
    by_name = tokens if isinstance(tokens, dict) else {embedding.rsplit(".", 1)[-1]: tokens}
    add_tokens(model, max(0, 1 + max(map(max, by_name.values())) - model.get_input_embeddings().weight.shape[0]))
    for given, indices in by_name.items():
        name = next((name for name in rows if name == given or name.endswith(f".{given}")), given)
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight[indices] = rows.pop(name).to(weight.dtype)


def settle(model: PreTrainedModel) -> None:
    """Puts moved rows into their matrices, so that embedding and head are plain again."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, GrownEmbedding):
        write_rows(embedding.weight, embedding.rows, torch.tensor(embedding.tokens, device=embedding.weight.device))
        num_tokens, width = embedding.weight.shape
        with torch.device("meta"):
            plain = nn.Embedding(num_tokens, width, padding_idx=embedding.padding_idx)
        plain.weight = embedding.weight
        model.set_input_embeddings(plain)
    if isinstance(head, GrownHead):
        write_rows(head.weight, head.rows, head.tokens_N)
        with torch.device("meta"):
            linear = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        linear.weight, linear.bias = head.weight, head.bias
        model.set_output_embeddings(linear)
