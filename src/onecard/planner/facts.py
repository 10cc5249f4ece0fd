"""What a plan knows of the text."""

from dataclasses import asdict

from onecard.data import ChatCorpus, CorpusRequest, TrainingData, find_prepared, survey
from onecard.errors import DataError
from onecard.spec import CorpusFacts, Recipe

_OF_CHATS = {"num_train_rows", "num_target_tokens", "num_heldout_target_tokens"}


def facts_of(corpus: TrainingData) -> CorpusFacts:
    """The facts of a prepared corpus."""
    known = CorpusFacts.model_fields.keys() - {"is_estimate"}
    if not isinstance(corpus, ChatCorpus):
        known -= _OF_CHATS
    return CorpusFacts(**{name: getattr(corpus, name) for name in known})


def survey_facts(recipe: Recipe) -> CorpusFacts:
    """What is known of a recipe's text without preparing it: all where that was done before, else its size."""
    request = CorpusRequest.of(recipe)
    try:
        corpus = find_prepared(request)
    except DataError:
        corpus = None  # a plan for a card needs no text
    if corpus is not None:
        return facts_of(corpus)
    return CorpusFacts(**asdict(survey(request)), separator_id=0, fingerprint="", is_estimate=True)
