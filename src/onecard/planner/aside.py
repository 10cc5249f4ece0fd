"""What a run does on the card besides its steps, recorded: evaluation, samples, checkpoints."""

import torch
from torch import Tensor

from onecard.data import Batch
from onecard.evaluation.heldout import sum_rows
from onecard.model.attention import attention_of
from onecard.model.decoder import Decoder
from onecard.planner.recorder import Recorder
from onecard.training.state import TrainState

# Phases that belong to no step.
PHASES = ("evaluation", "sampling", "saving")


def evaluate(recorder: Recorder, state: TrainState, batch: Batch) -> None:
    """Records the evaluation of a batch."""
    recorder.phase, recorder.micro_batch = "evaluation", 0
    state.model.eval()
    sum_rows(Decoder(state.model, compiled=False), state.head, batch, state.plan.attn_implementation)
    state.model.train()


@torch.no_grad()
def sample(recorder: Recorder, state: TrainState) -> None:
    """Records the first and the last token of samples: `generate` itself reads values, which fakes do not have.

    A prompt is taken to have as many tokens as UTF-8 bytes. The cache grows by every token, so the last needs most of
    it; what the sizes between leave of fragments in the allocator is not seen.
    """
    plan, model = state.plan, state.model
    if not plan.sample_prompts:
        return
    context = getattr(model.config, "max_position_embeddings", None) or plan.max_seq_length
    num_prompt = min(1 + max(len(prompt.encode("utf-8")) for prompt in plan.sample_prompts), max(1, context // 2))
    num_tokens = min(num_prompt + plan.sample_max_new_tokens, context)
    recorder.phase, recorder.micro_batch = "sampling", 0
    model.eval()
    ids = torch.zeros((len(plan.sample_prompts), num_prompt), dtype=torch.int64)
    # Code that counts positions by itself reads them off a mask of columns.
    make_mask = _columns if plan.attn_implementation == "apart" else _mask
    with attention_of(model, "sdpa"):
        out = model(input_ids=ids, attention_mask=make_mask(ids, num_prompt), use_cache=True, logits_to_keep=1)
        _choose(out.logits)
        cache = out.past_key_values
        _lengthen(cache, num_tokens - 1 - num_prompt)
        last = ids[:, :1]
        mask = make_mask(last, num_tokens)
        out = model(input_ids=last, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        _choose(out.logits)
    model.train()


def save(recorder: Recorder, state: TrainState) -> None:
    """Records a checkpoint: each tensor goes to the host by itself, so only those in pieces are copied on the card."""
    recorder.phase, recorder.micro_batch = "saving", 0
    tensors = [*state.optimizer.masters.values(), *state.optimizer.state_tensors().values()]
    for tensor in (*tensors, state.loss_scale.value.clone()):
        tensor.detach().contiguous()


def _mask(ids: Tensor, num_keys: int) -> Tensor:
    """Which keys each query sees, one plane per row, as padding asks for."""
    return torch.ones((ids.shape[0], 1, ids.shape[1], num_keys), dtype=torch.bool)


def _columns(ids: Tensor, num_keys: int) -> Tensor:
    return torch.ones((ids.shape[0], num_keys), dtype=torch.int64)


def _choose(logits_BTV: Tensor) -> None:
    torch.softmax(logits_BTV[:, -1].float() / 0.8, -1)


def _lengthen(cache: object, num_more: int) -> None:
    """Gives a cache the length it has before the last token."""
    if num_more <= 0:
        return
    for layer in cache.layers:  # type: ignore[attr-defined]
        for name in ("keys", "values"):
            tensor = getattr(layer, name)
            more = tensor.new_zeros((*tensor.shape[:-2], num_more, tensor.shape[-1]))
            setattr(layer, name, torch.cat([tensor, more], -2))
