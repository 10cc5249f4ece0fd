"""New tokens beside frozen weights: their rows of embedding and head move, the others rest.

    embedding  weight [V, D] frozen     rows [n, D] moving     the last n of the V tokens
    head       weight [V, D] frozen     rows, the embedding's own where the two are tied

Before the head's weight is used, the rows are written into it, so that logits need no second matrix; gradients go to
the rows alone. In files they are PEFT's `trainable_token_indices`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from onecard.errors import InputError


class GrownEmbedding(nn.Module):
    """An embedding whose last rows move."""

    def __init__(self, frozen: nn.Embedding, rows_ND: nn.Parameter) -> None:
        super().__init__()
        self.weight = frozen.weight
        self.padding_idx = frozen.padding_idx
        self.rows = rows_ND

    @property
    def first(self) -> int:
        """The first new token."""
        return self.weight.shape[0] - self.rows.shape[0]

    def forward(self, ids_BT: Tensor) -> Tensor:
        is_new_BT1 = (ids_BT >= self.first)[..., None]
        new_BTD = F.embedding((ids_BT - self.first).clamp(min=0), self.rows)
        return torch.where(is_new_BT1, new_BTD, F.embedding(ids_BT, self.weight))


class GrownHead(nn.Linear):
    """An output projection whose last rows move."""

    def __init__(self, frozen: nn.Linear, rows_ND: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight, self.bias, self.rows = frozen.weight, frozen.bias, rows_ND

    def forward(self, x: Tensor) -> Tensor:
        write_rows(self.weight, self.rows)
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
def write_rows(weight_VD: Tensor, rows_ND: Tensor | None) -> None:
    """Writes what has moved into the matrix it belongs to."""
    if rows_ND is not None:
        weight_VD[weight_VD.shape[0] - rows_ND.shape[0] :] = rows_ND.to(weight_VD.dtype)


def train_new_tokens(model: PreTrainedModel, num_new: int) -> None:
    """Lets the rows of the last `num_new` tokens move, in fp32; nothing else changes.

    Raises:
        InputError: embedding or head of this architecture do more than look up and multiply.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise InputError(
            f"new tokens cannot be trained beside adapters in a {model.config.model_type}, whose embedding is a "
            f"{type(embedding).__name__}: use method full, or a chat template without new tokens"
        )
    rows = _rows_of(embedding.weight, num_new)
    is_tied = head.weight is embedding.weight
    model.set_input_embeddings(GrownEmbedding(embedding, rows))
    model.set_output_embeddings(GrownHead(head, rows if is_tied else _rows_of(head.weight, num_new)))


def _rows_of(weight_VD: Tensor, num_new: int) -> nn.Parameter:
    return nn.Parameter(weight_VD.detach()[-num_new:].float().clone())


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
        write_rows(embedding.weight, embedding.rows)
        num_tokens, width = embedding.weight.shape
        with torch.device("meta"):
            plain = nn.Embedding(num_tokens, width, padding_idx=embedding.padding_idx)
        plain.weight = embedding.weight
        model.set_input_embeddings(plain)
    if isinstance(head, GrownHead):
        write_rows(head.weight, head.rows)
        with torch.device("meta"):
            linear = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        linear.weight, linear.bias = head.weight, head.bias
        model.set_output_embeddings(linear)
