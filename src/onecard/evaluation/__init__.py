"""How good a model is."""

from onecard.evaluation.heldout import HeldoutLoss, measure_heldout_loss

__all__ = ["HeldoutLoss", "measure_heldout_loss"]
