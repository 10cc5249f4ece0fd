"""Many texts in few rows: each is the text that it would be alone, and no step runs what has ended."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from onecard.model.batching import suits
from onecard.model.build import build_model
from onecard.model.generate import AtOnce, Sampling, complete_ids

NUM_IDS = 40
GREEDY = Sampling(max_new_tokens=14, temperature=0)
# Sliding windows shorter than a text; heads that share keys.
NEAR = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0, "num_key_value_heads": 1}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 1}),
    ("qwen3", {}),
    ("gpt2", {}),
    ("qwen2", NEAR),
]
PROMPTS = [[3], [5, 9, 2, 7, 11, 4, 8, 1, 2, 3], [1, 6, 3], [12, 13], [30, 31, 32, 33, 34], [7, 7, 7, 7]]


@pytest.fixture
def model_of(settings_of: Callable[..., dict[str, Any]]) -> Callable[..., PreTrainedModel]:
    def make(name: str, **changes: Any) -> PreTrainedModel:
        settings = settings_of(name, vocab_size=NUM_IDS, tie_word_embeddings=False, **changes)
        model = build_model(settings, dropout=0.0, init="transformers", seed=5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
        return model.eval()

    return make


@torch.no_grad()
def naive(model: PreTrainedModel, prompt: Sequence[int], stops: Sequence[int], num_new: int) -> list[int]:
    """The whole text anew for every token, by transformers' own attention."""
    model.set_attn_implementation("eager")
    context, new = model.config.max_position_embeddings, list[int]()
    window = list(prompt)
    while len(new) < num_new and not (new and new[-1] in stops):
        window = window[-(context // 2) :] if len(window) >= context else window
        new.append(int(model(input_ids=torch.tensor([window])).logits[0, -1].argmax()))
        window.append(new[-1])
    return new


@contextmanager
def shapes_run(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    found: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: found.append(inputs[0].shape))
    try:
        yield found
    finally:
        hook.remove()


@pytest.mark.parametrize(("name", "changes"), CASES, ids=["shared heads", "qwen3", "gpt2", "windows"])
@pytest.mark.parametrize("num_texts", [1, 2, 3, 6])
def test_texts_in_few_rows_are_those_of_the_plain_model(
    name: str, changes: dict[str, Any], num_texts: int, model_of: Callable[..., PreTrainedModel]
) -> None:
    model = model_of(name, **changes)
    assert suits(model)
    # Ids that end texts at different places, so that rows are freed and filled anew.
    free = [naive(model, prompt, [], 14) for prompt in PROMPTS]
    stops = [free[1][3], free[2][6]]
    expected = [naive(model, prompt, stops, 14) for prompt in PROMPTS]
    assert len({len(new) for new in expected}) > 2
    told: dict[int, list[int]] = {}
    found = complete_ids(model, PROMPTS, stops, GREEDY, at_once=AtOnce(num_texts, told.__setitem__))
    assert found == expected
    assert told == dict(enumerate(expected))


def test_no_step_runs_a_text_that_has_ended_or_a_token_that_was_run(
    model_of: Callable[..., PreTrainedModel],
) -> None:
    model = model_of("llama")
    free = complete_ids(model, PROMPTS, [NUM_IDS + 1], GREEDY)
    stops = [free[1][3], free[2][6]]
    with shapes_run(model) as shapes:
        found = complete_ids(model, PROMPTS, stops, GREEDY, at_once=AtOnce(2))
    assert max(rows for rows, _ in shapes) == 2
    # The last new token of a text is never run.
    steps = sum(rows for rows, length in shapes if length == 1)
    wholes = sum(rows for rows, length in shapes if length > 1) + sum(len(prompt) == 1 for prompt in PROMPTS)
    assert wholes == len(PROMPTS)
    assert steps - sum(len(prompt) == 1 for prompt in PROMPTS) == sum(len(new) - 1 for new in found)


def test_rows_are_filled_before_the_first_step(
    model_of: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    assert suits(model)
    monkeypatch.setattr("onecard.model.batching._NUM_TOKENS_AT_ONCE", {"cpu": 10})
    with shapes_run(model) as shapes:
        complete_ids(model, PROMPTS, [NUM_IDS + 1], GREEDY)
    num_groups = sum(shape != (len(PROMPTS), 1) for shape in shapes)
    assert num_groups > 1
    assert len(shapes) - num_groups == GREEDY.max_new_tokens - 1
    assert shapes[num_groups:] == [(len(PROMPTS), 1)] * (GREEDY.max_new_tokens - 1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_windows_slide_for_each_text_by_itself(name: str, model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of(name)
    context = model.config.max_position_embeddings
    prompts = [[3], list(range(30)), [5, 6, 7] * context, [9, 4]]
    long = Sampling(max_new_tokens=2 * context, temperature=0)
    found = complete_ids(model, prompts, [NUM_IDS + 1], long, at_once=AtOnce(3))
    assert found == [naive(model, prompt, [], 2 * context) for prompt in prompts]


def test_draws_are_those_of_transformers(model_of: Callable[..., PreTrainedModel]) -> None:
    model, prompt = model_of("qwen3"), [5, 6, 7]
    drawn = Sampling(max_new_tokens=20, temperature=1.7, top_k=20, top_p=0.9, seed=3)
    model.set_attn_implementation("sdpa")
    torch.manual_seed(3)
    own = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3),
        eos_token_id=None,
        max_new_tokens=20,
        **drawn.keywords(),
    )
    assert complete_ids(model, [prompt], [NUM_IDS + 1], drawn)[0] == own[0, 3:].tolist()
    assert complete_ids(model, [prompt], [NUM_IDS + 1], GREEDY)[0] != own[0, 3:17].tolist()


def test_a_text_that_is_over_ends_with_a_stop(model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of("llama")
    free = complete_ids(model, PROMPTS, [NUM_IDS + 1], GREEDY)
    found = complete_ids(model, PROMPTS, [NUM_IDS + 1], GREEDY, lambda new: len(new) == 5, AtOnce(2))
    assert found == [[*new[:5], NUM_IDS + 1] for new in free]


def test_a_model_that_keeps_more_than_keys_is_run_by_transformers() -> None:
    torch.manual_seed(0)
    kinds, heads = ["conv", "full_attention"], {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(
        "lfm2",
        vocab_size=NUM_IDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=kinds,
        **heads,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not suits(model)
    told: dict[int, list[int]] = {}
    found = complete_ids(model, [[3, 4], [5, 6]], [NUM_IDS - 1], GREEDY, at_once=AtOnce(1, told.__setitem__))
    assert found == [naive(model, prompt, [NUM_IDS - 1], 14) for prompt in ([3, 4], [5, 6])]
    assert told == dict(enumerate(found))
