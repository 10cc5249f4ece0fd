"""Completions: those of the plain model, whatever the batch, the cache and the window."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers.decoders import Fuse, Strip
from tokenizers.decoders import Sequence as DecodeInOrder
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.data import train_tokenizer
from onecard.errors import InputError
from onecard.model.build import DOCUMENT_START, build_model
from onecard.model.generate import Sampling, check_prompts, complete, complete_ids

NAMES = ["llama", "qwen3", "gpt2"]
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
PROMPTS = ["a", "hello there", "xyz."]
GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer("char", [LETTERS])


@pytest.fixture
def model_of(
    settings_of: Callable[..., dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Callable[[str], PreTrainedModel]:
    def make(name: str) -> PreTrainedModel:
        settings = settings_of(name, vocab_size=len(LETTERS) + 1, tie_word_embeddings=False)
        model = build_model(settings, dropout=0.0, init="transformers", seed=5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
        return model

    return make


@torch.no_grad()
def naive(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, num_new: int) -> str:
    """Runs the whole window through the model for every new token, without cache, padding or our attention.

    A window that has become as long as the model knows goes on with its newer half.
    """
    model.eval()
    context = model.config.max_position_embeddings
    window = [tokenizer.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    written: list[int] = []
    while len(written) < num_new:
        window = window[-(context // 2) :] if len(window) >= context else window
        chosen = int(model(input_ids=torch.tensor([window])).logits[0, -1].argmax())
        if chosen == tokenizer.eos_token_id:
            break
        window.append(chosen)
        written.append(chosen)
    return str(tokenizer.decode(written))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_completions_are_those_of_the_plain_model(
    name: str, model_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of(name)
    expected = [naive(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert complete(model, tokenizer, PROMPTS, GREEDY) == expected
    assert [complete(model, tokenizer, [prompt], GREEDY)[0] for prompt in PROMPTS] == expected
    # A model that repeats one letter would agree with itself in any case.
    assert len(set("".join(expected))) > 5


def test_sampling_depends_on_the_seed_and_leaves_the_global_random_state(
    model_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("qwen3").train()
    before = torch.get_rng_state()
    first, again, other = (
        complete(model, tokenizer, PROMPTS, Sampling(12, temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.config._attn_implementation == "onecard_sdpa"


def test_narrow_sampling_is_greedy(
    model_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("llama")
    greedy = complete(model, tokenizer, PROMPTS, GREEDY)
    assert complete(model, tokenizer, PROMPTS, Sampling(12, temperature=1.5, top_k=1)) == greedy
    assert complete(model, tokenizer, PROMPTS, Sampling(12, temperature=1.5, top_p=1e-6)) == greedy
    assert complete(model, tokenizer, PROMPTS, Sampling(12, temperature=1e-4)) == greedy


@pytest.mark.parametrize("name", NAMES)
def test_the_window_slides_beyond_the_trained_length(
    name: str, model_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of(name)
    context = model.config.max_position_embeddings
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0  # or the text might end before the window does
    found = complete(model, tokenizer, ["hello"], Sampling(3 * context, temperature=0))
    assert found == [naive(model, tokenizer, "hello", 3 * context)]
    assert len(found[0]) == 3 * context
    # A prompt longer than the model knows is cut to what it knows.
    long = "hello there " * 20
    assert complete(model, tokenizer, [long], Sampling(5, temperature=0)) == [naive(model, tokenizer, long, 5)]


def test_a_text_stops_at_its_end_while_others_go_on(
    model_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("qwen3")
    # The likeliest letter somewhere inside the first completion becomes the end of text, by swapping two rows.
    long = complete(model, tokenizer, ["abc"], GREEDY)[0]
    place = next(index for index in range(2, len(long)) if long[index] not in long[:index])
    end, letter = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(long[place])
    with torch.no_grad():
        model.lm_head.weight[[end, letter]] = model.lm_head.weight[[letter, end]]
    stopped, other = complete(model, tokenizer, ["abc", "hello there"], GREEDY)
    assert stopped == long[:place]
    assert stopped == naive(model, tokenizer, "abc", 12)
    assert other == naive(model, tokenizer, "hello there", 12)


@pytest.mark.parametrize("name", NAMES)
def test_ids_continue_as_alone_whatever_the_lengths_beside_them(
    name: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    model = model_of(name)
    prompts = [[3], [5, 9, 2, 7, 11, 4, 8], [1, 6, 3]]
    together = complete_ids(model, prompts, [0], GREEDY)
    assert together == [complete_ids(model, [prompt], [0], GREEDY)[0] for prompt in prompts]
    assert len({token for ids in together for token in ids}) > 5


def test_ids_end_with_whichever_stop_comes_first(model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("llama")
    prompts = [[3], [5, 9, 2]]
    free = complete_ids(model, prompts, [0], GREEDY)
    stops = [0, free[0][4], free[1][2]]
    expected = [ids[: next(i for i, token in enumerate(ids, 1) if token in stops)] for ids in free]
    assert expected != free
    assert complete_ids(model, prompts, stops, GREEDY) == expected


@pytest.mark.parametrize(("prompts", "stops"), [([[3], []], [0]), ([[3]], [])])
def test_nothing_to_begin_or_to_end_with_is_refused(
    prompts: list[list[int]], stops: list[int], model_of: Callable[[str], PreTrainedModel]
) -> None:
    with pytest.raises(InputError, match="needs a stop id and at least one id"):
        complete_ids(model_of("llama"), prompts, stops, GREEDY)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", None])
def test_a_prompt_begins_as_the_models_own_text_did(
    template: str | None, model_of: Callable[[str], PreTrainedModel]
) -> None:
    own = train_tokenizer("char", [LETTERS])
    own.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    start, end = own.convert_tokens_to_ids(["<s>", "</s>"])
    if template is not None:
        tokens = [("<s>", start), ("</s>", end)]
        own.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    model = model_of("qwen3")
    model.resize_token_embeddings(len(own))
    plain, stop = own.encode("hello", add_special_tokens=False), own.eos_token_id

    def continued(opening: list[int]) -> list[str]:
        return [own.decode(complete_ids(model, [opening + plain], [stop], GREEDY)[0], skip_special_tokens=True)]

    # A model from scratch saw its separator before every document, whatever the tokenizer would add.
    assert complete(model, own, ["hello"], GREEDY) == continued([stop])
    # An existing one saw what its tokenizer adds by itself; a closing token would end the prompt.
    delattr(model.config, DOCUMENT_START)
    assert complete(model, own, ["hello"], GREEDY) == continued([] if template is None else [start])
    assert continued([stop]) != continued([]) != continued([start]) != continued([stop])


def test_a_completion_keeps_the_space_before_its_first_word(model_of: Callable[[str], PreTrainedModel]) -> None:
    model, own = model_of("qwen3"), train_tokenizer("char", [LETTERS])
    wild = Sampling(max_new_tokens=3, temperature=50.0)
    expected = complete(model, own, list(LETTERS) * 4, wild)
    assert any(text.startswith(" ") for text in expected)
    # As Llama tokenizers decode: the first word of a text loses its space.
    own.backend_tokenizer.decoder = DecodeInOrder([Fuse(), Strip(" ", 1, 0)])
    assert complete(model, own, list(LETTERS) * 4, wild) == expected


def test_what_a_models_folder_recommends_does_not_act_unseen(
    model_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("llama")
    expected = complete(model, tokenizer, PROMPTS, GREEDY)
    model.generation_config.repetition_penalty = 5.0
    assert complete(model, tokenizer, PROMPTS, GREEDY) == expected
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("kind", ["char", "bytes", "bpe"])
def test_characters_that_would_be_dropped_are_refused(kind: str) -> None:
    own = train_tokenizer(kind, [LETTERS] * 3, 257 if kind == "bpe" else None)
    check_prompts(own, ["hello there.", " a  b ", ""])
    if kind == "char":
        with pytest.raises(InputError) as caught:
            check_prompts(own, ["hello", "ROMEO:", "你好", "a!", "a\tb"])
        assert [line.split("'")[1] for line in str(caught.value).splitlines()] == [
            *("ROMEO:", "你好", "a!", r"a\tb"),
        ]
    else:
        check_prompts(own, ["ROMEO:", "你好", "\t\n", "e\u0301"])


def test_a_prompt_that_was_no_utf8_is_refused() -> None:
    with pytest.raises(InputError, match="is not UTF-8 text"):
        check_prompts(train_tokenizer("bytes", ()), ["caf\udce9"])


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), 1e-300])
def test_a_temperature_that_leaves_no_numbers_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match=r"temperature is .*: give 0"):
        Sampling(temperature=temperature).check()


def test_values_without_a_meaning_are_refused_together() -> None:
    with pytest.raises(InputError) as caught:
        Sampling(max_new_tokens=0, temperature=-1, top_k=0, top_p=1.5, seed=2**64).check()
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        "max_new_tokens",
        "temperature",
        "seed",
        "top_k",
        "top_p",
    ]
    Sampling(max_new_tokens=1, temperature=0, top_k=1, top_p=1.0).check()
