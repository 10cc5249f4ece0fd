"""Settings of another micro-batch, for remedies."""

from onecard.spec import Plan


def micro_batch_setting(plan: Plan, size: int) -> str:
    """Names a micro-batch of so many rows and, beside it, what keeps the step as it is.

    A recipe that has `gradient_accumulation_steps` would refuse the size alone.
    """
    if plan.packing == "off" and plan.total_batch_size % size == 0:
        beside = f"gradient_accumulation_steps: {plan.total_batch_size // size}"
    else:  # of packed chats the rows are counted, of a step the chats
        beside = f"total_batch_size: {plan.total_batch_size}"
    return f"per_device_train_batch_size: {size}, {beside}"
