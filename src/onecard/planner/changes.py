"""What else a plan could be: one thing changed at a time."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from onecard.errors import InputError
from onecard.planner.device import Target, find_compiler_problem
from onecard.planner.optimizers import other_optimizers
from onecard.planner.ranks import hold_in_parts
from onecard.planner.shape import usual_loss_chunk
from onecard.spec import AdaptPlan, Plan

_HALF = 0.5
# A change that follows from others, told where it is to be typed.
FOLLOWING = "eval_batch_size"


def changes_of(plan: Plan, target: Target) -> Iterator[dict[str, Any]]:
    """Other settings of the same method and strategy, a row each."""
    micro, length = plan.micro_batch_size, plan.max_seq_length
    for size in dict.fromkeys((2 * micro, micro // 2, 1)):
        if 1 <= size <= -(-plan.rows_per_step // target.num_ranks) and size != micro:
            yield with_micro_batch(plan, size)
    for share in (False, _HALF, True):
        if share != plan.gradient_checkpointing:
            yield {"gradient_checkpointing": share}
    yield from other_losses(plan)
    may_compile = plan.attn_implementation != "apart" and find_compiler_problem(target) is None
    if plan.torch_compile or may_compile:
        yield {"torch_compile": not plan.torch_compile}
    for name in other_optimizers(plan):
        yield {"optimizer": plan.optimizer.model_copy(update={"name": name})}
    if length >= 128:
        # The same tokens per step, in shorter sequences; as many chats, which are cut.
        total = plan.total_batch_size if plan.task == "sft" else 2 * plan.total_batch_size
        yield {"max_seq_length": length // 2, "total_batch_size": total}


def with_micro_batch(plan: Plan, size: int) -> dict[str, Any]:
    """Another micro-batch, with the total that keeps the step as it is whatever a recipe accumulates."""
    evaluation = min(plan.eval_batch_size, size)
    return {"micro_batch_size": size, "total_batch_size": plan.total_batch_size, "eval_batch_size": evaluation}


def other_losses(plan: Plan) -> Iterator[dict[str, Any]]:
    """The loss in chunks where it is not, and with all logits at once where they are more than a chunk's."""
    usual = usual_loss_chunk(plan.model, "cuda")
    if plan.loss_chunk_size == "full":
        yield {"loss_chunk_size": usual}
    elif plan.micro_batch_size * plan.max_seq_length > (plan.loss_chunk_size or usual):
        yield {"loss_chunk_size": "full"}


def other_strategies(plan: Plan, target: Target) -> Iterator[dict[str, Any]]:
    """The other way for ranks to share a run, where there is one."""
    if target.num_ranks == 1:
        return
    if plan.strategy == "fsdp":
        yield {"strategy": "ddp"}
        return
    with contextlib.suppress(InputError):
        hold_in_parts(plan)
        yield {"strategy": "fsdp"}


def other_methods(plan: Plan) -> Iterator[dict[str, Any]]:
    """Other methods for a run that starts from a model, adapters as recipes have them by default."""
    if plan.model.base is None:
        return
    if plan.adapt is not None:
        yield {"adapt": None}
    for method in ("lora", "qlora"):
        if (plan.adapt is None or plan.adapt.method != method) and (method == "lora" or find_spec("bitsandbytes")):
            given = plan.adapt.model_dump() if plan.adapt else {}
            yield {"adapt": AdaptPlan(**given | {"method": method})}
