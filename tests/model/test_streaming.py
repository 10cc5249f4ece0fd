"""Text token by token is the text that is written at once, whatever was run before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from onecard.errors import InputError
from onecard.model.build import build_model
from onecard.model.generate import Sampling, complete_ids
from onecard.model.streaming import PrefixCache, stream_ids

STOP = [0]
GREEDY = Sampling(max_new_tokens=12, temperature=0)
SAMPLED = Sampling(max_new_tokens=12, temperature=1.2, top_k=40, top_p=0.95, seed=7)


@pytest.fixture
def model_of(settings_of: Callable[..., dict[str, Any]]) -> Callable[..., PreTrainedModel]:
    def make(name: str, **changes: Any) -> PreTrainedModel:
        settings = settings_of(name, max_position_embeddings=64, tie_word_embeddings=False, **changes)
        model = build_model(settings, dropout=0.0, init="transformers", seed=5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
        return model

    return make


@contextmanager
def run_lengths(model: PreTrainedModel) -> Iterator[list[int]]:
    """Notes how many tokens each forward pass runs."""
    found: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: found.append(inputs[0].shape[1]))
    try:
        yield found
    finally:
        hook.remove()


def always(_: int) -> bool:
    return True


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_streamed_text_is_that_of_a_batch_of_one(
    name: str, sampling: Sampling, model_of: Callable[..., PreTrainedModel]
) -> None:
    model, told = model_of(name), list[int]()
    before = torch.get_rng_state()
    streamed = stream_ids(model, [5, 6, 7], STOP, sampling, lambda token: told.append(token) or True)
    assert streamed == told == complete_ids(model, [[5, 6, 7]], STOP, sampling)[0]
    assert len(set(streamed)) > 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_what_was_run_before_is_not_run_again_and_changes_nothing(
    name: str, model_of: Callable[..., PreTrainedModel]
) -> None:
    model, prefix = model_of(name), PrefixCache()
    first = stream_ids(model, [5, 6, 7], STOP, GREEDY, always, prefix)
    # Goes on from the answer; branches off inside it; asks the same again; has nothing in common.
    prompts = [[5, 6, 7, *first, 9, 8], [5, 6, 7, *first[:4], 11], [5, 6, 7, *first[:4], 11], [30, 31]]
    for prompt, num_new in zip(prompts, [3, 1, 1, 2], strict=True):
        with run_lengths(model) as lengths:
            found = stream_ids(model, prompt, STOP, GREEDY, always, prefix)
        assert lengths[0] == num_new
        assert set(lengths[1:]) == {1}
        assert found == complete_ids(model, [prompt], STOP, GREEDY)[0]


def test_a_window_that_forgets_is_run_anew(model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    prefix, prompt = PrefixCache(), list(range(1, 15))
    first = stream_ids(model, prompt, STOP, GREEDY, always, prefix)
    longer = [*prompt, *first[:3], 9]
    with run_lengths(model) as lengths:
        found = stream_ids(model, longer, STOP, GREEDY, always, prefix)
    assert lengths[0] == len(longer)
    assert found == complete_ids(model, [longer], STOP, GREEDY)[0]


def test_a_text_ends_when_told_and_the_next_goes_on_from_it(model_of: Callable[..., PreTrainedModel]) -> None:
    model, prefix, told = model_of("llama"), PrefixCache(), list[int]()
    cut = stream_ids(model, [5, 6], STOP, GREEDY, lambda token: told.append(token) or len(told) < 3, prefix)
    whole = complete_ids(model, [[5, 6]], STOP, GREEDY)[0]
    assert cut == told == whole[:3]
    assert stream_ids(model, [5, 6, *cut], STOP, GREEDY, always, prefix)[:9] == whole[3:]


def test_an_interruption_costs_the_cache_alone(model_of: Callable[..., PreTrainedModel]) -> None:
    model, prefix = model_of("llama"), PrefixCache()

    def interrupt(_: int) -> bool:
        raise KeyboardInterrupt

    stream_ids(model, [5, 6], STOP, GREEDY, always, prefix)
    with pytest.raises(KeyboardInterrupt):
        stream_ids(model, [5, 6, 9], STOP, GREEDY, interrupt, prefix)
    assert stream_ids(model, [5, 6], STOP, GREEDY, always, prefix) == complete_ids(model, [[5, 6]], STOP, GREEDY)[0]


def test_the_stop_id_is_the_last(model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of("llama")
    whole = complete_ids(model, [[5, 6]], STOP, GREEDY)[0]
    assert stream_ids(model, [5, 6], [whole[2]], GREEDY, always) == whole[: whole.index(whole[2]) + 1]


@pytest.mark.parametrize(
    ("prompt", "stops", "sampling"),
    [([], STOP, GREEDY), ([5], [], GREEDY), ([5], STOP, Sampling(64)), ([5], STOP, Sampling(4, temperature=-1))],
)
def test_what_cannot_be_written_is_refused(
    prompt: list[int], stops: list[int], sampling: Sampling, model_of: Callable[..., PreTrainedModel]
) -> None:
    with pytest.raises(InputError):
        stream_ids(model_of("llama"), prompt, stops, sampling, always)
