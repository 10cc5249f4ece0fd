"""Responses to many prompts are those that each would get alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from onecard.data.tokenizer import train_tokenizer
from onecard.errors import InputError
from onecard.evaluation import work
from onecard.evaluation.responses import respond
from onecard.evaluation.task import Subject
from onecard.model.generate import AtOnce

PROMPTS = ["a", "a much longer prompt", "two words", "b"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer("bytes", ())


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, settings_of: Callable[..., dict[str, Any]]) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = settings_of(request.param, vocab_size=300, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()


def test_batches_change_nothing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = [respond(Subject(model, tokenizer, {}), PROMPTS, 12, batch_size) for batch_size in (1, 3, 4)]
    alone = [respond(Subject(model, tokenizer, {}), [prompt], 12, 1).texts[0] for prompt in PROMPTS]
    assert found[0] == found[1] == found[2]
    assert list(found[0].texts) == alone
    assert (found[0].token_limit, found[0].template) == (12, "none")
    assert len(set(alone)) > 1


def test_the_limit_is_what_the_positions_leave(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = respond(Subject(model, tokenizer, {}), PROMPTS, 1280, 4)
    assert 63 - len(PROMPTS[1]) - 2 <= found.token_limit <= 63 - len(PROMPTS[1])
    # All but the last id of the row have a position, and no window has slid.
    limited = respond(Subject(model, tokenizer, {}), PROMPTS, found.token_limit, 4)
    assert limited == found
    with pytest.raises(InputError, match=r"1 of 5 prompts leave no room.* 64 positions"):
        respond(Subject(model, tokenizer, {}), [*PROMPTS, "x" * 80], 8, 4)


def test_a_batch_that_does_not_fit_is_halved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = respond(Subject(model, tokenizer, {}), PROMPTS, 6, 4)
    sizes = []
    generate = work.complete_ids

    def small(*arguments: Any, at_once: AtOnce) -> Any:
        sizes.append(at_once.num_texts)
        if at_once.num_texts > 1:
            raise torch.OutOfMemoryError
        return generate(*arguments, at_once=at_once)

    monkeypatch.setattr(work, "complete_ids", small)
    assert respond(Subject(model, tokenizer, {}), PROMPTS, 6, 4) == whole
    assert sizes == [4, 2, 1]
