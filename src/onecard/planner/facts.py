"""What a plan knows of the text."""

from dataclasses import asdict
from pathlib import Path

from onecard.data import (
    ChatCorpus,
    ChatRequest,
    CorpusRequest,
    TrainingData,
    find_prepared,
    find_prepared_chats,
    survey,
    survey_chats,
)
from onecard.errors import DataError
from onecard.spec import CorpusFacts, Recipe

_OF_CHATS = {"num_train_rows", "num_target_tokens", "num_heldout_target_tokens", "control_tokens", "new_tokens"}


def facts_of(corpus: TrainingData) -> CorpusFacts:
    """The facts of a prepared corpus."""
    known = CorpusFacts.model_fields.keys() - {"is_estimate"}
    if not isinstance(corpus, ChatCorpus):
        known -= _OF_CHATS
    return CorpusFacts(**{name: getattr(corpus, name) for name in known})


def survey_facts(recipe: Recipe, base: Path | None = None) -> CorpusFacts:
    """What is known of a recipe's text without preparing it: all where that was done before, else its size.

    `base` is the folder of the recipe's model, None where it is from scratch or not on this machine.
    """
    if recipe.task == "sft":
        return _survey_chats(recipe, base)
    request = CorpusRequest.of(recipe, base)
    try:
        corpus = find_prepared(request)
    except DataError:
        corpus = None  # a plan for a card needs no text
    if corpus is not None:
        return facts_of(corpus)
    return CorpusFacts(**asdict(survey(request)), separator_id=0, fingerprint="", is_estimate=True)


def _survey_chats(recipe: Recipe, base: Path | None) -> CorpusFacts:
    request = ChatRequest.of(recipe, base)
    try:
        corpus = None if base is None else find_prepared_chats(request)
    except DataError:
        corpus = None  # a plan for a card needs no chats
    if corpus is not None:
        return facts_of(corpus)
    found = survey_chats(request)
    return CorpusFacts(
        vocab_size=0,
        num_train_tokens=found.num_train_tokens,
        num_heldout_tokens=found.num_heldout_tokens,
        train_bytes=0,
        heldout_bytes=0,
        separator_id=0,
        fingerprint="",
        num_train_rows=found.num_train_rows,
        is_estimate=True,
    )
