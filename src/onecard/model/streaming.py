"""One text, token by token: transformers' own generation, listened to, with the keys and values of the text before."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.generation.stopping_criteria import StoppingCriteria

from onecard.errors import InputError
from onecard.model.attention import attention_of
from onecard.model.generate import Sampling, check_ids, plainly

OnId = Callable[[int], bool]


class PrefixCache:
    """The keys and values of the ids that a model ran last, so that a text that begins like them is not run anew.

    Belongs to one model with unchanging weights.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache: DynamicCache | None = None

    def take(self, ids: Sequence[int]) -> tuple[DynamicCache | None, int]:
        """Gives a cache of as many of the first ids as are known, but the last, and their number; keeps none of it."""
        cache, known = self._cache, self._ids
        self._cache, self._ids = None, []
        num_same = 0
        while num_same < min(len(known), len(ids) - 1) and known[num_same] == ids[num_same]:
            num_same += 1
        if cache is None or not num_same:
            return None, 0
        if num_same < len(known):
            cache.crop(num_same - len(known))
        return cache, num_same

    def keep(self, cache: Any, ids: Sequence[int]) -> None:
        """Keeps the cache of ids, the last of which have not run; one that cannot be shortened is let go."""
        # Sliding windows and recurrent states have lost what came before.
        if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
            self._cache, self._ids = cache, list(ids[: cache.get_seq_length()])


@torch.no_grad()
def stream_ids(
    model: PreTrainedModel,
    prompt: Sequence[int],
    stop_ids: Sequence[int],
    sampling: Sampling,
    on_id: OnId,
    prefix: PrefixCache | None = None,
) -> list[int]:
    """Continues one prompt of ids as `complete_ids` does, and calls `on_id` with each new id as soon as it is chosen.

    Ends where `on_id` returns False, after an id of `stop_ids` (which is told, too), or after `max_new_tokens`. Gives
    the new ids. With `prefix`, what the prompt shares with the text before is not run again; that changes logits by no
    more than rounding. Leaves the global random state as it was.

    Raises:
        InputError: sampling values without a meaning, no ids, ids that the model lacks, no stop id, or more tokens than
            the model has positions.
    """
    sampling.check()
    if not stop_ids or not prompt:
        raise InputError("generation needs a stop id and at least one id: give the end-of-text token")
    check_ids(model, [prompt])
    context = context_of(model)
    if len(prompt) + sampling.max_new_tokens > context:
        raise InputError(
            f"{len(prompt):,} tokens and {sampling.max_new_tokens:,} new ones are more than the {context:,} that the "
            "model knows: shorten the text, or ask for fewer"
        )
    device = model.get_input_embeddings().weight.device
    prefix = prefix or PrefixCache()
    cache, _ = prefix.take(prompt)
    listener = _Listener(on_id)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        attention_of(model, "sdpa"),
        plainly(model),
    ):
        torch.manual_seed(sampling.seed)
        cache = _generate(model, torch.tensor([list(prompt)], device=device), stop_ids, sampling, listener, cache)
    prefix.keep(cache, [*prompt, *listener.ids])
    return listener.ids


def context_of(model: PreTrainedModel) -> int:
    """Gives the number of positions that a model knows."""
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


def _generate(
    model: PreTrainedModel,
    prompt_1T: Tensor,
    stop_ids: Sequence[int],
    sampling: Sampling,
    listener: "_Listener",
    cache: DynamicCache | None,
) -> Any:
    """Runs `generate` and gives the cache that it leaves, of whatever kind the architecture has."""
    found = model.generate(
        input_ids=prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        past_key_values=cache,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        use_cache=True,
        remove_invalid_values=True,  # a model that diverged writes nonsense, but must not end a server
        stopping_criteria=StoppingCriteriaList([listener]),
        return_dict_in_generate=True,
        **sampling.keywords(),
    )
    return getattr(found, "past_key_values", None)


class _Listener(StoppingCriteria):
    """Sees each new id when `generate` asks whether to go on: its streamers are told too late to say no."""

    def __init__(self, on_id: OnId) -> None:
        self.ids: list[int] = []
        self._on_id = on_id

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.ids.append(int(input_ids[0, -1]))
        return torch.tensor([not self._on_id(self.ids[-1])], device=input_ids.device)
