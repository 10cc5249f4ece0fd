"""A plan for several processes: the same step, cut so that each has its share."""

from onecard.errors import InputError
from onecard.spec import Plan, Recipe
from onecard.training.sharded import check_shardable


def plan_for_ranks(plan: Plan, recipe: Recipe, num_ranks: int) -> Plan:
    """Cuts the step of a new run into micro-batches for so many processes; its samples stay as they are.

    Raises:
        InputError: there are not enough samples in a step; or it is asked to be held in parts and cannot.
    """
    if num_ranks > 1 and recipe.strategy == "fsdp":
        _check_samples(plan, num_ranks)
        plan = hold_in_parts(plan)
    return share_out(plan, recipe, num_ranks)


def share_out(plan: Plan, recipe: Recipe, num_ranks: int) -> Plan:
    """Cuts the step of a plan so that each of so many processes has a share, however it was cut before.

    A micro-batch that was given is kept where there are enough of it.

    Raises:
        InputError: there are more processes than samples in a step.
    """
    if recipe.per_device_train_batch_size == "auto":
        return recut(plan, num_ranks)
    if num_ranks > 1 and plan.num_micro_batches >= num_ranks:
        return plan.model_copy(update={"seeds_micro_batches": True})
    return recut(plan, num_ranks, of="micro_batch_size.asked")


def recut(plan: Plan, num_ranks: int, of: str = "micro_batch_size") -> Plan:
    """Cuts the step of a plan so that its micro-batches are shared out evenly, by making them smaller where need be.

    `of` is the decision that the reason is noted at.

    Raises:
        InputError: there are more processes than samples in a step.
    """
    if num_ranks == 1:
        return plan
    _check_samples(plan, num_ranks)
    plan = plan.model_copy(update={"seeds_micro_batches": True})
    size = even_size(plan, plan.micro_batch_size, num_ranks)
    if size >= plan.micro_batch_size:
        return plan
    reason = f"{num_ranks} processes share a step of {plan.total_batch_size} samples"
    if of != "micro_batch_size":
        reason = f"{size} sequences at once, not {plan.micro_batch_size}: {reason}"
    return plan.model_copy(update={"micro_batch_size": size, "reasons": plan.reasons | {of: reason}})


def even_size(plan: Plan, size: int, num_ranks: int) -> int:
    """The micro-batch, at most of this size, with which all ranks have as many of them, as full as can be."""
    num_micro_batches = -(-plan.rows_per_step // size)
    each = -(-num_micro_batches // num_ranks)
    return min(size, max(1, -(-plan.rows_per_step // (num_ranks * each))))


def even_sizes(plan: Plan, num_ranks: int) -> list[int]:
    """Micro-batches, smallest first: powers of two up to a rank's whole share, and that share, cut evenly."""
    total = -(-plan.rows_per_step // num_ranks)
    sizes = [*(1 << power for power in range(total.bit_length()) if 1 << power < total), total]
    return sizes if num_ranks == 1 else sorted({even_size(plan, size, num_ranks) for size in sizes})


def hold_in_parts(plan: Plan) -> Plan:
    """Lets each rank hold a part of the state.

    Raises:
        InputError: the plan cannot be trained so.
    """
    plan = plan.model_copy(update={"strategy": "fsdp"})
    check_shardable(plan)
    return plan


def _check_samples(plan: Plan, num_ranks: int) -> None:
    if plan.total_batch_size < num_ranks:
        raise InputError(
            f"{num_ranks} processes are more than the {plan.total_batch_size} samples of a step: start at most "
            f"{plan.total_batch_size}, or raise total_batch_size"
        )
