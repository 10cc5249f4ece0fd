"""Responses to many prompts: greedy, many at once, each as if it were alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.data import ChatTemplate, Turn
from onecard.errors import InputError
from onecard.evaluation.task import Subject
from onecard.evaluation.work import Continuations, Report
from onecard.model.generate import Sampling, decode_after, encode_prompts

# Rows at once where nobody says: more hardly speed up a CPU; a GPU halves what does not fit.
BATCH_SIZES = {"cpu": 16, "cuda": 64}


@dataclass(frozen=True)
class Responses:
    """Texts in the order of the prompts. `token_limit` is what the model's positions left of what was asked for.

    `num_unfinished` reached the limit without a stop token; `template` is a hash of the chat template, or none.
    """

    texts: tuple[str, ...]
    token_limit: int
    num_unfinished: int
    template: str


def respond(
    subject: Subject, prompts: Sequence[str], max_new_tokens: int, batch_size: int, report: Report | None = None
) -> Responses:
    """Responds to each prompt: as the turn of a user where the tokenizer has a chat template, else by going on with it.

    All responses may be equally long, also where the model has few positions: the limit is lowered to what the longest
    prompt leaves. A batch that does not fit the memory is halved.

    Raises:
        InputError: a prompt leaves no position for a response.
    """
    model, tokenizer = subject.model, subject.tokenizer
    encoded, stop_ids = _encode(model, tokenizer, prompts)
    limit = _token_limit(model, encoded, max_new_tokens)
    work = Continuations(encoded, stop_ids, Sampling(limit, temperature=0), batch_size)
    found = subject.perform(work, report or (lambda done, total: None))
    num_unfinished = sum(new[-1] not in stop_ids for new in found)
    # A tokenizer need not know that a stop token is no text.
    bodies = [new[: len(new) - (new[-1] in stop_ids)] for new in found]
    responses = tuple(decode_after(tokenizer, ids, body) for ids, body in zip(encoded, bodies, strict=True))
    return Responses(responses, limit, num_unfinished, name_template(tokenizer))


def name_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Gives a hash of the chat template of a tokenizer, or `none`."""
    text = tokenizer.chat_template
    return hashlib.sha256(str(text).encode("utf-8")).hexdigest()[:16] if text else "none"


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
    if not tokenizer.chat_template:
        return encode_prompts(model, tokenizer, prompts)
    template = ChatTemplate.of(tokenizer)
    return [template.prompt([Turn("user", prompt)]) for prompt in prompts], list(template.stop_ids)


def _token_limit(model: PreTrainedModel, encoded: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return max_new_tokens
    longest = max(map(len, encoded))
    limit = min(max_new_tokens, positions - 1 - longest)
    if limit < 1:
        num_long = sum(len(ids) >= positions - 1 for ids in encoded)
        raise InputError(
            f"{num_long} of {len(encoded)} prompts leave no room for a response: the longest has {longest:,} tokens, "
            f"the model {positions:,} positions. Evaluate a model with more (max_seq_length of its training), or give "
            "data with shorter prompts"
        )
    return limit
