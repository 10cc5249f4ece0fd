"""Continuous batching: texts that end make room for those that wait, and no step runs a padded token.

waiting (longest first) ──► run whole, a group of like length at a time ──► row of the cache ──► one token a step, and
as many more as were guessed right (`drafts.py`) ──► ended: its row is free for the next; longer than the model knows:
the newer half waits again, first in line
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from onecard.errors import InputError
from onecard.model.attention import attention_of
from onecard.model.drafts import Drafter, cut_to_common
from onecard.model.families import follows_interface
from onecard.model.loss import find_head
from onecard.model.row_cache import NAME, RowCache, UnsupportedAttentionError
from onecard.model.sampling import IsOver, Sampling, draw_each
from onecard.model.shortage import is_out_of_memory
from onecard.model.target import device_kind

# Tokens of whole texts that run together: what fills a device without taking much of its memory.
_NUM_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
# Texts wait until this share of the rows is free: running one of them alone costs as much as a step of all.
_REFILL_SHARE = 8

OnEnd = Callable[[int, list[int]], None]


@dataclass(frozen=True)
class Request:
    """What is wanted of every text. `on_end(index, new_ids)` hears of each as soon as it ends."""

    stop_ids: tuple[int, ...]
    sampling: Sampling
    num_rows: int
    is_over: IsOver | None
    on_end: OnEnd


@dataclass
class _Text:
    index: int
    context: list[int]
    drafter: Drafter | None
    stream: random.Random | None
    new: list[int] = field(default_factory=list)

    def append(self, new_id: int) -> None:
        self.context.append(new_id)
        self.new.append(new_id)
        if self.drafter is not None:
            self.drafter.append(new_id)


class Batcher:
    """Continues prompts of ids by a model's own decoder with a `RowCache`."""

    def __init__(self, model: PreTrainedModel, request: Request) -> None:
        self._model = model
        self._request = request
        self._head = find_head(model)
        self._device = model.get_input_embeddings().weight.device
        self._limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self._warpers = _warpers(request.sampling)

    def run(self, prompts: Sequence[Sequence[int]]) -> None:
        """Continues each prompt until it ends, and tells `on_end`."""
        texts = [self._begin_text(index, ids) for index, ids in enumerate(prompts)]
        waiting = deque(sorted(texts, key=lambda text: -len(text.context)))
        longest = len(waiting[0].context) + self._request.sampling.max_new_tokens
        num_rows = min(self._request.num_rows, len(texts))
        cache, active = RowCache(num_rows, min(self._limit, longest)), list[_Text]()
        with attention_of(self._model, NAME):
            while waiting or active:
                num_free = num_rows - len(active)
                if waiting and (not active or num_free * _REFILL_SHARE >= num_rows):
                    # To the last free row: a text that is left for later costs steps of its own.
                    while waiting and len(active) < num_rows:
                        group = self._next_group(waiting, num_rows - len(active))
                        tokens = self._choose(self.begin(cache, [text.context for text in group]), group)
                        active += group
                        self._accept(cache, active, waiting, [[token] for token in tokens])
                if active:
                    drafts = cut_to_common([self._draft(text) for text in active])
                    new = [[text.new[-1], *draft] for text, draft in zip(active, drafts, strict=True)]
                    chosen = iter(self._choose(self.advance(cache, new), active))
                    self._accept(cache, active, waiting, [_agreeing(draft, chosen) for draft in drafts])

    def _begin_text(self, index: int, ids: Sequence[int]) -> _Text:
        window = self._window(ids)
        return _Text(index, window, self._drafter(window), self._request.sampling.stream_of(index))

    def _drafter(self, context: Sequence[int]) -> Drafter | None:
        # What is drawn at random is no guess that can be checked.
        return Drafter(context) if self._warpers is None else None

    def _draft(self, text: _Text) -> list[int]:
        """Guesses what follows, but for the last token that a text may have: that one is never run."""
        left = min(self._request.sampling.max_new_tokens - len(text.new), self._limit - len(text.context)) - 1
        return text.drafter.draft(left) if text.drafter is not None else []

    def _next_group(self, waiting: deque[_Text], num_free: int) -> list[_Text]:
        group = [waiting.popleft()]
        longest = len(group[0].context)
        limit = _NUM_TOKENS_AT_ONCE[device_kind(self._device)]
        while waiting and len(group) < num_free:
            longest = max(longest, len(waiting[0].context))
            if longest * (len(group) + 1) > limit:
                break
            group.append(waiting.popleft())
        return group

    def begin(self, cache: RowCache, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Runs whole texts, padded on the right where causality hides it; gives the hidden state [R, D] of each end."""
        lengths = [len(ids) for ids in contexts]
        cache.begin(lengths)
        longest = max(lengths)
        ids_RT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in contexts], device=self._device)
        positions_RT = torch.arange(longest, device=self._device).expand(len(lengths), -1)
        rows_R, last_R = torch.tensor([range(len(lengths)), lengths], device=self._device)
        return self._decode(cache, ids_RT, positions_RT)[rows_R, last_R - 1]

    def advance(self, cache: RowCache, new: Sequence[Sequence[int]]) -> Tensor:
        """Runs one or more new tokens of each text; gives the hidden state [N, D] of each, text by text."""
        ids_N, positions_N = cache.advance(new, self._device)
        return self._decode(cache, ids_N[:, None], positions_N[:, None])[:, 0]

    def _decode(self, cache: RowCache, ids_RT: Tensor, positions_RT: Tensor) -> Tensor:
        hidden_RTD: Tensor = self._model.base_model(
            input_ids=ids_RT, position_ids=positions_RT, past_key_values=cache, use_cache=True, row_cache=cache
        ).last_hidden_state
        return hidden_RTD

    def _choose(self, hidden_RD: Tensor, texts: Sequence[_Text]) -> list[int]:
        logits_RV = self.logits(hidden_RD)
        if self._warpers is None:
            # The same index as `argmax`, which takes three times as long on a CPU (LOG.md).
            return list(logits_RV.max(-1).indices.tolist())
        scores_RV = self._warpers(torch.empty(0, device=self._device), logits_RV)
        streams = [text.stream for text in texts if text.stream is not None]
        if streams:  # what is drawn has no guesses: a row a text
            return draw_each(scores_RV, streams)
        return list(torch.multinomial(scores_RV.softmax(-1), 1)[:, 0].tolist())

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Gives the logits [R, V] of hidden states, in fp32, as the architecture defines them."""
        return self._head.finish(self._model.get_output_embeddings()(hidden_RD))

    def _accept(self, cache: RowCache, active: list[_Text], waiting: deque[_Text], tokens: list[list[int]]) -> None:
        """Adds tokens to each of the last texts; frees the rows of those that end or have no position left."""
        first = len(active) - len(tokens)
        # From the last to the first: where a row is freed, one that has had its tokens takes its place.
        for row in range(len(active) - 1, first - 1, -1):
            text = active[row]
            if self._has_ended_with(text, tokens[row - first]):
                self._request.on_end(text.index, text.new)
            elif len(text.context) >= self._limit:
                text.context = self._window(text.context)
                waiting.appendleft(text)
            else:
                cache.cut(row, len(text.context) - 1)
                continue
            cache.remove(row)
            active[row] = active[-1]
            active.pop()

    def _has_ended_with(self, text: _Text, tokens: list[int]) -> bool:
        """Adds tokens to a text up to the one that ends it, and says whether there is one."""
        for token in tokens:
            text.append(token)
            if self._has_ended(text):
                return True
        return False

    def _has_ended(self, text: _Text) -> bool:
        if text.new[-1] in self._request.stop_ids:
            return True
        if self._request.is_over is not None and self._request.is_over(text.new):
            text.new.append(self._request.stop_ids[0])
            return True
        return len(text.new) >= self._request.sampling.max_new_tokens

    def _window(self, ids: Sequence[int]) -> list[int]:
        return list(ids if len(ids) < self._limit else ids[-(self._limit // 2) :])


def _agreeing(draft: Sequence[int], chosen: Iterator[int]) -> list[int]:
    """Takes the tokens chosen before, between and after those of a draft; gives those up to its first mistake."""
    tokens = list(islice(chosen, len(draft) + 1))
    num_right = next((place for place, guess in enumerate(draft) if guess != tokens[place]), len(draft))
    return tokens[: num_right + 1]


def _warpers(sampling: Sampling) -> LogitsProcessorList | None:
    """What transformers' `generate` does to logits before it draws, in its order; None where the likeliest is taken."""
    if sampling.temperature == 0:
        return None
    # A model that is about to diverge must not end its run by a sample.
    found = LogitsProcessorList([InfNanRemoveLogitsProcessor(), TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k is not None:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        found.append(TopPLogitsWarper(float(sampling.top_p)))
    return found


# What a model of another kind than `Batcher` runs raises.
_OTHER_KINDS = (
    *(UnsupportedAttentionError, InputError),
    *(TypeError, ValueError, AttributeError, IndexError, RuntimeError),
)
_KNOWN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def suits(model: PreTrainedModel) -> bool:
    """Says whether a model can be run so: two texts, token by token, give the logits that it computes by itself."""
    if model not in _KNOWN:
        _KNOWN[model] = _has_plain_layers(model) and _gives_own_logits(model)
    return _KNOWN[model]


def _has_plain_layers(model: PreTrainedModel) -> bool:
    """Whether attention can be replaced, and all that a model keeps of a text is keys and values of its tokens."""
    if not follows_interface(model.config):
        return False
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    layers = DynamicCache(config=model.config).layers
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return "chunked_attention" not in types and all(type(layer) in plain for layer in layers)


@torch.no_grad()
def _gives_own_logits(model: PreTrainedModel) -> bool:
    num_ids = model.config.get_text_config(decoder=True).vocab_size
    texts = [[index * step % num_ids for index in range(1, length)] for step, length in ((1, 8), (3, 6))]
    device, was_training = model.get_input_embeddings().weight.device, model.training
    model.eval()
    try:
        with attention_of(model, "sdpa"):
            own = [model(input_ids=torch.tensor([ids], device=device)).logits[0, -4:].float() for ids in texts]
        with attention_of(model, NAME):
            found = _last_logits(model, texts)
    # Another kind of model does not know the keywords, or falls over what it does not find in the cache.
    except _OTHER_KINDS as error:
        if is_out_of_memory(error):
            raise
        return False
    finally:
        model.train(was_training)
    own_R4V = torch.stack(own)
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return float((found - own_R4V).abs().max()) <= tolerance * float(own_R4V.abs().max())


def _last_logits(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Gives the logits [R, 4, V] of the last four tokens of texts, the last three run alone and as a pair."""
    request = Request((0,), Sampling(temperature=0), len(texts), is_over=None, on_end=lambda index, new: None)
    batcher, cache = Batcher(model, request), RowCache(len(texts), max(map(len, texts)))
    first_RD = batcher.begin(cache, [ids[:-3] for ids in texts])
    second_RD = batcher.advance(cache, [ids[-3:-2] for ids in texts])
    pairs_RTD = batcher.advance(cache, [ids[-2:] for ids in texts]).view(len(texts), 2, -1)
    return torch.stack([batcher.logits(x) for x in (first_RD, second_RD, *pairs_RTD.unbind(1))], dim=1)
