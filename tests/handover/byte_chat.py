"""A tiny model that chats, with one token for each byte and random weights."""

import torch

from onecard.data import train_tokenizer
from onecard.data.chats.template_choice import DEFAULT
from onecard.handover.writer import Writer
from onecard.model.build import build_model

_SETTINGS = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def make_writer(context: int = 256, *, chats: bool = True, ends: bool = True) -> Writer:
    """Makes a writer with room for `context` tokens; without `chats` it has no template, without `ends` it goes on."""
    model = build_model(_SETTINGS | {"max_position_embeddings": context}, dropout=0.0, init="transformers", seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
    if not ends:
        end = torch.tensor([0])
        model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, end, float("-inf")))
    tokenizer = train_tokenizer("bytes", ())
    if chats:
        tokenizer.chat_template = DEFAULT
    return Writer(model, tokenizer)
