"""Answers of a model that chats: prompts in its template, ended by its stop tokens."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.data import ChatTemplate, Turn
from onecard.model.generate import Sampling, complete_ids


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling
) -> list[str]:
    """Answers each prompt as the only turn of a user, as one padded batch.

    Raises:
        DataError: the tokenizer has no chat template that can render a question.
    """
    template = ChatTemplate.of(tokenizer)
    encoded = [template.prompt([Turn("user", prompt)]) for prompt in prompts]
    completions = complete_ids(model, encoded, template.stop_ids, sampling)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
