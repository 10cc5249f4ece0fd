"""Random tokens in the shape of a recipe whose text is not on this machine: enough to time steps, of no other use."""

import json
from pathlib import Path
from typing import Any

from onecard.data import Batch
from onecard.planner import survey_facts
from onecard.planner.measure import random_step
from onecard.spec import CorpusFacts, Plan, Recipe
from onecard.spec.paths import STDLIB, locate

_NUM_TOKENS, _NUM_HELDOUT_TOKENS = 10_000_000, 100_000
# Of chats where none are there: their mean length at most, and the share of answers.
_CHAT_TOKENS, _TARGET_SHARE = 256, 0.5


def lacks_data(recipe: Recipe) -> bool:
    """Says whether the text of a recipe is not on this machine: none is named, or nothing is where it should be."""
    names = [source.path for source in (*recipe.dataset, *recipe.eval_dataset)]
    return not recipe.dataset or any(name != STDLIB and _is_missing_file(name) for name in names)


def _is_missing_file(name: str) -> bool:
    """A pattern or the name of a Hub data set is for the readers to judge."""
    return Path(name).suffix != "" and not any(letter in name for letter in "*?[") and locate(name) is None


def synthetic_facts(recipe: Recipe, base: Path | None) -> CorpusFacts:
    """What a plan is told of random tokens; `base` is the folder of the recipe's model."""
    known = survey_facts(recipe, base)
    found: dict[str, Any] = {
        "num_train_tokens": _NUM_TOKENS,
        "num_heldout_tokens": _NUM_HELDOUT_TOKENS,
        "fingerprint": "synthetic",
        "is_estimate": True,
    }
    if recipe.task == "sft":
        num_rows = _NUM_TOKENS // min(recipe.max_seq_length, _CHAT_TOKENS)
        targets = int(_TARGET_SHARE * _NUM_TOKENS)
        found |= {"num_train_rows": num_rows, "num_target_tokens": targets, "num_heldout_target_tokens": targets // 100}
    if not known.vocab_size and base is not None:  # of chats that nobody has looked at
        found["vocab_size"] = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return known.model_copy(update=found)


class RandomBatches:
    """The same step of random tokens again and again, without waiting."""

    wait_s = 0.0

    def __init__(self, plan: Plan) -> None:
        self._step = random_step(plan)

    def __next__(self) -> list[Batch]:
        return self._step
