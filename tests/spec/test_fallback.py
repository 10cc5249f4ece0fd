"""Fallbacks of a plan leave what is learned as it is."""

from collections.abc import Callable

import pytest

from onecard.spec import Plan
from onecard.spec.fallback import find_smaller_evaluation, find_smaller_step


def test_a_step_gets_smaller_until_nothing_is_left(tiny_plan: Callable[..., Plan]) -> None:
    plan = tiny_plan(micro_batch_size=5, total_batch_size=12)
    changes = []
    while (fallback := find_smaller_step(plan)) is not None:
        assert fallback.plan.total_batch_size == 12
        assert fallback.settings.keys() <= fallback.plan.reasons.keys()
        changes.append(fallback.describe(plan))
        plan = fallback.plan
    assert changes == [
        "micro_batch_size 5 -> 2",
        "micro_batch_size 2 -> 1",
        "gradient_checkpointing False -> True",
        "loss_chunk_size None -> 64",
    ]


def test_a_micro_batch_larger_than_the_step_is_halved_from_the_step(tiny_plan: Callable[..., Plan]) -> None:
    fallback = find_smaller_step(tiny_plan(micro_batch_size=64, total_batch_size=6))
    assert fallback is not None
    assert fallback.plan.micro_batch_size == 3


@pytest.mark.parametrize(("size", "batches"), [(8, None), (8, 5), (6, 3), (5, 2), (7, 1), (3, 7)])
def test_an_evaluation_keeps_its_rows(size: int, batches: int | None, tiny_plan: Callable[..., Plan]) -> None:
    plan = tiny_plan(eval_batch_size=size, eval_batches=batches)
    while (fallback := find_smaller_evaluation(plan)) is not None:
        assert fallback.plan.eval_batch_size <= plan.eval_batch_size // 2
        plan = fallback.plan
        if batches is not None:
            assert plan.eval_batches is not None
            assert plan.eval_batches * plan.eval_batch_size == size * batches
    assert plan.eval_batch_size == 1
