"""`onecard prepare`."""

import json
import sys
from typing import TYPE_CHECKING, Any

from onecard.cli.audit_text import audit_rows, print_samples
from onecard.cli.preparation import PreparationProgress
from onecard.cli.recipe_words import ConfigOption, JsonOption, RecipeWords, recipe_from_words
from onecard.cli.rows import print_rows
from onecard.units import format_bytes, format_count

if TYPE_CHECKING:
    from onecard.data import TrainingData


def prepare(words: RecipeWords = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Builds the token files of a recipe, shows what of chats is learned; `train` does the same when it has to."""
    recipe = recipe_from_words(words or [], config, "prepare")
    from onecard import api

    with PreparationProgress(sys.stderr) as progress:
        corpus = api.prepare(recipe, progress=progress)
    if as_json:
        print(json.dumps(_facts(corpus)))
    else:
        print_rows(_rows(corpus))
        if corpus.audit is not None:
            print_samples(corpus.audit)


def _facts(corpus: "TrainingData") -> dict[str, Any]:
    return {
        "tokenizer": str(corpus.tokenizer_folder),
        "vocab_size": corpus.vocab_size,
        "train_files": [str(file.path) for file in corpus.train],
        "num_train_tokens": corpus.num_train_tokens,
        "train_bytes": corpus.train_bytes,
        "heldout_files": [str(file.path) for file in corpus.heldout],
        "num_heldout_tokens": corpus.num_heldout_tokens,
        "heldout_bytes": corpus.heldout_bytes,
        **({} if corpus.audit is None else {"audit": corpus.audit.model_dump()}),
    }


def _rows(corpus: "TrainingData") -> list[tuple[str, str]]:
    audit = corpus.audit
    num_targets = (None, None) if audit is None else (audit.num_target_tokens, audit.num_heldout_target_tokens)
    return [
        ("tokenizer", f"vocabulary {corpus.vocab_size}"),
        ("", str(corpus.tokenizer_folder)),
        ("to train", _describe_part(corpus.num_train_tokens, corpus.train_bytes, num_targets[0])),
        *(("", str(file.path)) for file in corpus.train),
        ("held out", _describe_part(corpus.num_heldout_tokens, corpus.heldout_bytes, num_targets[1])),
        *(("", str(file.path)) for file in corpus.heldout),
        *(() if audit is None else audit_rows(audit)),
    ]


def _describe_part(num_tokens: int, num_bytes: int, num_target_tokens: int | None) -> str:
    if num_tokens == 0:
        return "nothing"
    if num_target_tokens is not None:
        return f"{format_count(num_tokens)} tokens, {format_count(num_target_tokens)} of them to learn"
    per_token = num_bytes / num_tokens
    return f"{format_count(num_tokens)} tokens from {format_bytes(num_bytes)}, {per_token:.2f} bytes per token"
