"""Text from prompts, many at once: by `batching.py` where the architecture allows, else by transformers' `generate`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from onecard.errors import InputError
from onecard.model.attention import attention_of
from onecard.model.batching import Batcher, OnEnd, Request, suits
from onecard.model.build import DOCUMENT_START
from onecard.model.families import carries_state
from onecard.model.sampling import IsOver, Sampling

__all__ = [
    "AtOnce",
    "IsOver",
    "OnEnd",
    "Sampling",
    "check_ids",
    "check_prompts",
    "complete",
    "complete_ids",
    "decode_after",
    "encode_prompts",
    "opening_of",
    "plainly",
]


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling
) -> list[str]:
    """Completes each prompt, without repeating it, all at once, with a key-value cache.

    A prompt begins as the model's training text did. A completion ends at the end of text or after `max_new_tokens`.
    Where it would outgrow the length the model was trained on, the window slides: the newer half stays as context.
    Leaves the global random state as it was.
    """
    encoded, stop_ids = encode_prompts(model, tokenizer, prompts)
    completions = complete_ids(model, encoded, stop_ids, sampling)
    return [decode_after(tokenizer, before, ids) for before, ids in zip(encoded, completions, strict=True)]


def encode_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
    """Gives the ids of each prompt, begun as the model's training text was, and the ids that end a completion.

    Raises:
        InputError: nothing names the end of a text.
    """
    stop = _end_of_text(model, tokenizer)
    opening = _opening(model, tokenizer)
    return [[*opening, *tokenizer.encode(prompt, add_special_tokens=False)] or [stop] for prompt in prompts], [stop]


def opening_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Gives the ids that stand before a text: of a model from scratch its separator, else what the tokenizer adds."""
    return _opening(model, tokenizer)


def decode_after(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """Decodes what follows other ids: a Llama tokenizer drops the space before the first word it decodes."""
    head, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (before, [*before, *ids]))
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True)
class AtOnce:
    """How many texts run at once; `on_end(index, new_ids)` hears of each that has ended."""

    num_texts: int
    on_end: OnEnd = lambda index, new_ids: None


@torch.no_grad()
def complete_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    sampling: Sampling,
    is_over: IsOver | None = None,
    at_once: AtOnce | None = None,
) -> list[list[int]]:
    """Continues each prompt of ids, as `complete` does; gives the new ids alone.

    A text that ended by itself has one of `stop_ids` as its last id. `is_over(new_ids)` ends a text for other reasons,
    such as words to stop at, with the first of `stop_ids` after them. `at_once` bounds how many texts run together.

    Raises:
        InputError: sampling values without a meaning, a prompt without ids or with one the model lacks, or no stop id.
    """
    sampling.check()
    if not stop_ids or not all(prompts):
        raise InputError("generation needs a stop id and at least one id in every prompt: give the end-of-text token")
    check_ids(model, prompts)
    device = model.get_input_embeddings().weight.device
    devices = [device] if device.type == "cuda" else []
    at_once = at_once or AtOnce(len(prompts))
    done: dict[int, list[int]] = {}

    def end(index: int, new: list[int]) -> None:
        done[index] = new
        at_once.on_end(index, new)

    with torch.random.fork_rng(devices=devices), plainly(model):
        torch.manual_seed(sampling.seed)
        request = Request(tuple(stop_ids), sampling, at_once.num_texts, is_over, end)
        if suits(model):
            Batcher(model, request).run(prompts)
        else:
            _run_by_generate(model, prompts, request)
    return [done[index] for index in range(len(prompts))]


@contextmanager
def plainly(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without what the folder of a model recommends, such as a penalty that nobody asked for."""
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


def check_ids(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
    """Refuses ids that the model has no row for: on a GPU one of them would end all work of the process.

    Raises:
        InputError: with the largest.
    """
    num_rows, largest = model.get_input_embeddings().weight.shape[0], max(map(max, prompts))
    if largest >= num_rows:
        name = f"the model {model.name_or_path}" if model.name_or_path else "the model"
        raise InputError(
            f"this text has the token {largest:,}, and {name} knows {num_rows:,}: its tokenizer is another model's, "
            "or has tokens that were never trained. Put the model's own tokenizer files into its folder"
        )


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
    """Refuses prompts with characters that the tokenizer would drop or replace.

    Raises:
        InputError: every such prompt, together.
    """
    problems = [problem for prompt in prompts if (problem := _problem_of(tokenizer, prompt))]
    if problems:
        raise InputError("\n".join(problems))


def _problem_of(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str | None:
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        return f"prompt {prompt!r} is not UTF-8 text: set the terminal to UTF-8, or give it by --prompt-file"
    if _has_unknown(tokenizer, prompt):
        return f"prompt {prompt!r} has characters that the tokenizer of this text does not know: leave them out"
    return None


def _has_unknown(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    encoding = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in encoding["input_ids"]:
        return True
    # A character tokenizer has no token for the unknown: it skips what it does not know.
    known = {place for span in encoding.get("offset_mapping", [(0, len(prompt))]) for place in range(*span)}
    # Some tokenizers join a space to the word after it and leave it out of the word's span.
    return any(place not in known and character != " " for place, character in enumerate(prompt))


def _end_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    # A tokenizer may have no such token by name; the config of a trained model knows which one stood for it.
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id
    if isinstance(found, list):
        found = found[0]
    if found is None:
        raise InputError("neither the tokenizer nor the model's config names an end-of-text token (eos_token_id)")
    return int(found)


def _opening(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a text: for a model from scratch its separator, else what the tokenizer adds by itself."""
    start = getattr(model.config, DOCUMENT_START, None)
    if start is not None:
        return [int(start)]
    whole, plain = (tokenizer.encode("a", add_special_tokens=adds) for adds in (True, False))
    place = next(i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain)
    return list(whole[:place])


def _run_by_generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], request: Request) -> None:
    """Runs texts that no `RowCache` can hold, such as those of recurrent models, in padded batches."""
    # A state would take padding in, and RWKV's code mixes up the rows of a batch: one text at a time. So do texts with
    # streams of their own, for the rows of a batch draw from one.
    has_streams = request.sampling.streams is not None
    num_rows = 1 if has_streams or carries_state(model.config) else request.num_rows
    # transformers' own attention honours the padding mask.
    with attention_of(model, "sdpa"):
        for first in range(0, len(prompts), num_rows):
            if (stream := request.sampling.stream_of(first)) is not None:
                torch.manual_seed(stream.getrandbits(63))
            batch = [list(ids) for ids in prompts[first : first + num_rows]]
            for offset, new in enumerate(_complete_batch(model, batch, request)):
                request.on_end(first + offset, new)


def _complete_batch(model: PreTrainedModel, encoded: list[list[int]], request: Request) -> list[list[int]]:
    stops, sampling, is_over = list(request.stop_ids), request.sampling, request.is_over
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    texts, done = [list(ids) for ids in encoded], [False] * len(encoded)
    remaining = sampling.max_new_tokens
    while remaining and not all(done):
        active = [index for index, is_done in enumerate(done) if not is_done]
        windows = [texts[index][-(context - 1) :] for index in active]
        if max(map(len, windows)) >= context - 1:
            windows = [window[-(context // 2) :] for window in windows]
        num_new = min(remaining, context - max(map(len, windows)))
        before = [texts[index][len(encoded[index]) :] for index in active]
        ends = _RowEnds(before, max(map(len, windows)), is_over) if is_over is not None else None
        for index, new in zip(active, _run(model, windows, stops, num_new, sampling, ends), strict=True):
            texts[index].extend(new)
            done[index] = bool(new) and new[-1] in stops
        remaining -= num_new
    return [text[len(ids) :] for text, ids in zip(texts, encoded, strict=True)]


class _RowEnds(StoppingCriteria):
    """Ends rows whose new ids say so; `before` are those of earlier windows."""

    def __init__(self, before: list[list[int]], num_prompt: int, is_over: IsOver) -> None:
        self._before = before
        self._num_prompt = num_prompt
        self._is_over = is_over

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        rows = zip(self._before, input_ids[:, self._num_prompt :].tolist(), strict=True)
        return torch.tensor([self._is_over([*before, *new]) for before, new in rows], device=input_ids.device)


def _run(
    model: PreTrainedModel,
    windows: list[list[int]],
    stops: list[int],
    num_new: int,
    sampling: Sampling,
    ends: _RowEnds | None = None,
) -> list[list[int]]:
    """Generates up to `num_new` tokens after each window; a stopped row ends with the token that stopped it."""
    longest = max(map(len, windows))
    ids = torch.tensor([[stops[0]] * (longest - len(window)) + window for window in windows])
    mask = torch.tensor([[0] * (longest - len(window)) + [1] * len(window) for window in windows])
    device = model.get_input_embeddings().weight.device
    out: Tensor = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=num_new,
        eos_token_id=stops,
        pad_token_id=stops[0],
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([ends] if ends is not None else []),
        synced_gpus=False,  # a state in parts keeps in step by itself (training/in_step.py)
        remove_invalid_values=True,  # a model that is about to diverge must not end its run by a sample
        **sampling.keywords(),
    )
    rows = out[:, longest:].tolist()
    return [row[: next((i for i, token in enumerate(row, 1) if token in stops), len(row))] for row in rows]
