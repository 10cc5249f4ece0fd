"""What onecard takes for granted of an architecture, checked on a few tokens of the model itself."""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from onecard.errors import InputError
from onecard.model.attention import attention_of, find_borders
from onecard.model.decoder import Decoder
from onecard.model.families import find_backend, implementation_of
from onecard.model.loss import find_head


def check_architecture(model: PreTrainedModel) -> None:
    """Checks head and document borders, before any weight is zeroed.

    Raises:
        InputError: training would not do what it says with this architecture.
    """
    weight = model.get_output_embeddings().weight
    if isinstance(weight, FakeTensor) or weight.is_meta:
        return  # without values there is nothing to compare
    was_training = model.training
    model.eval()
    with attention_of(model, implementation_of(model.config, find_backend(model.config))):
        check_head(model)
        check_attention(model)
        check_borders(model)
    model.train(was_training)


@torch.no_grad()
def check_borders(model: PreTrainedModel) -> None:
    """Checks on a few tokens that nothing before a document's border and nothing after a token reaches it.

    Raises:
        InputError: the architecture mixes tokens elsewhere than in the attention that onecard provides (recurrent or
            convolution layers), so that packed documents would leak into each other.
    """
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    borders = find_borders(documents, (1, 6), next(model.parameters()), find_backend(model.config))
    assert borders is not None
    decoder = Decoder(model, compiled=False)
    ids = torch.tensor([[0, 1, 0, 0, 1, 0]])
    changed = torch.tensor([[1, 0, 1, 0, 1, 1]])
    hidden, other = (decoder(rows, borders)[3:5] for rows in (ids, changed))
    if not torch.allclose(hidden, other, *_tolerance(model, 1e-5)):
        raise InputError(
            f"{model.config.model_type} mixes tokens outside its attention, so packed documents would leak into each "
            "other: choose an architecture with attention alone, such as qwen3, llama or gpt2"
        )


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Compares the attention that onecard provides with the one transformers would run, on a few tokens.

    Raises:
        InputError: they differ, as where tokens are to see those after them.
    """
    ids = torch.arange(6)[None] % model.config.get_text_config().vocab_size
    decoder = Decoder(model, compiled=False)
    found = decoder(ids, find_borders(None, (1, 6), next(model.parameters()), find_backend(model.config))).float()
    with attention_of(model, "sdpa"):
        own = decoder(ids, None).float()
    # By their lengths: in 16 bits single numbers differ by the order of a sum.
    if (found - own).norm() > (1e-3 if model.dtype == torch.float32 else 0.3) * own.norm():
        raise InputError(
            f"{model.config.model_type} attends in a way onecard does not know, so it would train another function "
            "than the model computes: choose another model_type"
        )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compares the head of `model/loss.py` with the architecture's own logits on a few tokens.

    Raises:
        InputError: they differ, so that training would optimise another function than the model computes.
    """
    head = find_head(model)
    ids = torch.arange(4)[None] % model.config.get_text_config().vocab_size
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = Decoder(model, compiled=False)(ids, None)
    if not torch.allclose(head.finish(head.logits(hidden)), own, *_tolerance(model, 1e-4)):
        raise InputError(
            f"{model.config.model_type} changes its logits in a way onecard does not know, so its loss cannot be "
            "computed in chunks: choose another model_type"
        )


def _tolerance(model: PreTrainedModel, absolute: float) -> tuple[float, float]:
    """Relative and absolute: an existing model may lie in 16 bits, and what is looked for changes every digit."""
    return (1e-4, absolute) if model.dtype == torch.float32 else (5e-2, 5e-2)
