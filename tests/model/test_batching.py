"""Many texts in few rows: each is the text that it would be alone, and no step runs what has ended."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from onecard.model.batching import suits
from onecard.model.build import build_model
from onecard.model.generate import AtOnce, IsOver, Sampling, complete_ids
from onecard.model.sampling import draw_each

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
    def make(name: str, seed: int = 5, **changes: Any) -> PreTrainedModel:
        settings = settings_of(name, vocab_size=NUM_IDS, tie_word_embeddings=False, **changes)
        model = build_model(settings, dropout=0.0, init="transformers", seed=seed)
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


def of_length(num_new: int) -> IsOver:
    return lambda new: len(new) == num_new


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


@pytest.fixture
def without_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.model.drafts._LONGEST", 0)


@pytest.mark.usefixtures("without_guesses")
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


@pytest.mark.usefixtures("without_guesses")
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


@pytest.mark.parametrize(("name", "changes"), CASES, ids=["shared heads", "qwen3", "gpt2", "windows"])
def test_guesses_save_steps_and_change_no_text(
    name: str, changes: dict[str, Any], model_of: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also where few texts have any, so that texts of one step differ.
    monkeypatch.setattr("onecard.model.drafts._SHARE", 1e-9)
    # Past the positions of the model, so that windows slide, too.
    long = replace(GREEDY, max_new_tokens=40)
    num_tokens = num_run = num_steps = 0
    for seed in (5, 6, 7):
        model = model_of(name, seed=seed, **changes)
        assert suits(model)
        expected = [naive(model, prompt, [], 40) for prompt in PROMPTS]
        for num_texts in (1, 4):
            with shapes_run(model) as shapes:
                found = complete_ids(model, PROMPTS, [NUM_IDS + 1], long, at_once=AtOnce(num_texts))
            assert found == expected
            if num_texts == 1:
                num_tokens += sum(map(len, found))
                num_steps += len(shapes)
                num_run += sum(tokens for tokens, length in shapes if length == 1)
    assert num_steps < num_tokens < num_run


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_ends_where_it_must_within_what_was_guessed(
    name: str, model_of: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onecard.model.drafts._SHARE", 1e-9)
    model = model_of(name)
    free = [naive(model, prompt, [], 20) for prompt in PROMPTS]
    for num_new in range(1, 20):
        limited = replace(GREEDY, max_new_tokens=num_new)
        assert complete_ids(model, PROMPTS, [NUM_IDS + 1], limited, at_once=AtOnce(4)) == [
            new[:num_new] for new in free
        ]
        over = complete_ids(model, PROMPTS, [NUM_IDS + 1], replace(GREEDY, max_new_tokens=20), of_length(num_new))
        assert over == [[*new[:num_new], NUM_IDS + 1] for new in free]
    for stop in sorted({token for new in free for token in new[2:]})[:12]:
        expected = [new[: new.index(stop) + 1] if stop in new else new for new in free]
        assert complete_ids(model, PROMPTS, [stop], replace(GREEDY, max_new_tokens=20), at_once=AtOnce(4)) == expected


def test_what_is_drawn_is_not_guessed(model_of: Callable[..., PreTrainedModel]) -> None:
    model = model_of("llama")
    assert suits(model)
    drawn = Sampling(max_new_tokens=24, temperature=1e-4)
    with shapes_run(model) as shapes:
        complete_ids(model, PROMPTS, [NUM_IDS + 1], drawn, at_once=AtOnce(1))
    assert len(shapes) == 24 * len(PROMPTS)
    with shapes_run(model) as shapes:
        complete_ids(model, PROMPTS, [NUM_IDS + 1], replace(drawn, temperature=0), at_once=AtOnce(1))
    assert len(shapes) < 24 * len(PROMPTS)


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


@pytest.mark.parametrize("is_suited", [True, False])
def test_a_stream_of_its_own_draws_a_text_whatever_is_written_beside_it(
    is_suited: bool, model_of: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    monkeypatch.setattr("onecard.model.generate.suits", lambda model: is_suited)
    prompts = [*PROMPTS, PROMPTS[0]]
    drawn = Sampling(max_new_tokens=20, temperature=1.5, seed=3, streams=tuple(range(len(prompts))))
    found = complete_ids(model, prompts, [0], drawn, at_once=AtOnce(3))
    for index, prompt in enumerate(prompts):
        assert complete_ids(model, [prompt], [0], replace(drawn, streams=(index,))) == [found[index]]
    # Neither a prompt nor a seed alone decides.
    assert found[0] != found[-1]
    assert complete_ids(model, prompts, [0], replace(drawn, seed=4)) != found


def test_draws_from_streams_have_the_shares_of_the_scores() -> None:
    shares = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    streams = [random.Random(number) for number in range(4000)]
    counts = torch.bincount(torch.tensor(draw_each(shares.log().expand(4000, -1), streams)), minlength=5)
    assert (counts / 4000 - shares).abs().max() < 0.03  # some four standard errors
    assert counts[1] == counts[4] == 0

    class Highest(random.Random):
        def random(self) -> float:
            return 1 - 2**-53

    assert draw_each(shares.log()[None], [Highest()]) == [3]
