"""What a plan becomes where memory runs out in spite of its forecast: the same training, less of it at once."""

from dataclasses import dataclass
from typing import Any

from onecard.spec.plan import Plan

# Tokens whose logits exist at once, where nothing else is left to be made smaller.
_SMALLEST_CHUNK = 64
_CHANGEABLE = ("micro_batch_size", "gradient_checkpointing", "loss_chunk_size", "eval_batch_size", "eval_batches")


@dataclass(frozen=True)
class Fallback:
    """A plan and which of its settings are others than before."""

    plan: Plan
    settings: dict[str, Any]

    def describe(self, before: Plan) -> str:
        """Says what changes, as `micro_batch_size 8 -> 4`."""
        return ", ".join(f"{name} {getattr(before, name)} -> {value}" for name, value in self.settings.items())


def find_smaller_step(plan: Plan) -> Fallback | None:
    """The same step with less at once: half the micro-batch, then all activations recomputed, then fewer logits.

    The samples of a step and the normalisation of their loss stay as they are; None where nothing is left to halve.
    """
    if plan.micro_batch_size > 1:
        # No more than a step has: halving what is not there frees nothing.
        rows = min(plan.micro_batch_size, plan.rows_per_step)
        return _change(plan, micro_batch_size=max(1, rows // 2))
    if plan.gradient_checkpointing is not True:
        return _change(plan, gradient_checkpointing=True)
    if not isinstance(plan.loss_chunk_size, int) or plan.loss_chunk_size > _SMALLEST_CHUNK:
        return _change(plan, loss_chunk_size=_SMALLEST_CHUNK)
    return None


def find_smaller_evaluation(plan: Plan) -> Fallback | None:
    """The same evaluation in smaller batches, about half; None where a batch is one row already."""
    if plan.eval_batch_size == 1:
        return None
    if plan.eval_batches is None:
        return _change(plan, eval_batch_size=plan.eval_batch_size // 2)
    # So many batches are so many rows, which must stay the same ones.
    num_rows = plan.eval_batches * plan.eval_batch_size
    size = next(size for size in range(plan.eval_batch_size // 2, 0, -1) if num_rows % size == 0)
    return _change(plan, eval_batch_size=size, eval_batches=num_rows // size)


def settings_in_force(before: Plan, now: Plan) -> dict[str, Any]:
    """What fallbacks have changed from one plan to another."""
    return {name: getattr(now, name) for name in _CHANGEABLE if getattr(now, name) != getattr(before, name)}


def _change(plan: Plan, **settings: Any) -> Fallback:
    reasons = plan.reasons | dict.fromkeys(settings, "memory ran out in the run with more")
    return Fallback(plan.model_copy(update={**settings, "reasons": reasons}), settings)
