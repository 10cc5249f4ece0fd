"""How good a model is."""

from onecard.evaluation.heldout import HeldoutLoss, measure_blocks, measure_heldout_loss, summarize
from onecard.evaluation.paired import Difference, Items, compare_items, correct

__all__ = [
    "Difference",
    "HeldoutLoss",
    "Items",
    "compare_items",
    "correct",
    "measure_blocks",
    "measure_heldout_loss",
    "summarize",
]
