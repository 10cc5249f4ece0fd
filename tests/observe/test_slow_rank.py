"""A process that is slower than the others, found in what all of them tell of their own work."""

from collections.abc import Callable
from typing import Any

import pytest

from onecard.observe.detectors import History, in_chinese
from onecard.observe.detectors.ranks import find_slow_rank
from onecard.observe.events import Event, RanksEvent, StepEvent
from onecard.observe.lines import parse_event, to_json_line
from onecard.observe.prose import describe_ranks

STEP_S = 0.5


def look(step: int, forward_s: tuple[float, ...], **changes: Any) -> RanksEvent:
    usual: dict[str, Any] = {
        "elapsed_s": step * STEP_S,
        "num_steps": 20,
        "step_s": STEP_S,
        "data_s": (0.0,) * len(forward_s),
        "num_tokens": (100.0,) * len(forward_s),
    }
    return RanksEvent(step=step, forward_s=forward_s, **usual | changes)


@pytest.fixture
def find(tiny_plan: Callable[..., Any]) -> Callable[..., Any]:
    def find(looks: list[RanksEvent], num_steps: int = 100) -> Any:
        events: list[Event] = [
            StepEvent(
                step=step,
                elapsed_s=step * STEP_S,
                loss=2.0,
                learning_rate=1e-3,
                grad_norm=1.0,
                num_target_tokens=400,
                tokens_seen=400 * step,
                is_finite=True,
                step_s=STEP_S,
                tokens_per_s=800.0,
                wait_s=0.0,
            )
            for step in range(1, num_steps + 1)
        ]
        return find_slow_rank(History.of(tiny_plan(num_steps=1000), [*events, *looks]))

    return find


def test_a_slow_rank_is_named_with_what_it_costs(find: Callable[..., Any]) -> None:
    slow = [look(step, (0.1, 0.1, 0.1, 0.2)) for step in (40, 60, 80, 100)]
    finding = find(slow)
    assert finding.id == "slow-rank"
    assert finding.evidence == (
        "rank 3 needed 2.00 times as long for a token as the others over the last 80 steps; "
        "the others waited for it in 50% of a step of 0.5 s"
    )
    assert finding.remedy.endswith("(without waiting a step takes 0.25 s)")
    told, _ = in_chinese(finding.id, finding.evidence, finding.remedy)
    assert told.startswith("最近 80 步，rank 3 处理每个 token 的用时是其他 rank 的 2.00 倍；每步 0.5 秒")
    assert find(slow[:2]) is None
    assert find(slow, num_steps=30) is None  # fifteen seconds say nothing


def test_ranks_that_keep_up_are_not_named(find: Callable[..., Any]) -> None:
    assert find([look(step, (0.1, 0.11, 0.1, 0.115)) for step in (40, 60, 80, 100)]) is None
    # One that was slow once, and one that has longer rows.
    assert find([look(step, (0.1, 0.3 if step == 60 else 0.1)) for step in (40, 60, 80, 100)]) is None
    longer = {"num_tokens": (100.0, 200.0)}
    assert find([look(step, (0.1, 0.2), **longer) for step in (40, 60, 80, 100)]) is None


def test_a_rank_that_waits_for_data_is_slow_by_that(find: Callable[..., Any]) -> None:
    finding = find([look(step, (0.1, 0.1), data_s=(0.0, 0.25)) for step in (40, 60, 80, 100)])
    assert finding.evidence.startswith("rank 1 needed 2.00 times as long")
    assert finding.evidence.endswith("it waited for data in 50% of a step")


def test_shares_add_up_to_the_step_of_the_slowest() -> None:
    event = look(10, (0.05, 0.2), data_s=(0.0, 0.1))
    assert max(event.busy_s) == pytest.approx(STEP_S)
    assert event.waiting_shares == pytest.approx((0.8, 0.0))
    assert parse_event(to_json_line(event)) == event
    assert describe_ranks([event, event]) == "2 ranks: rank 1 was the slowest, the others waited 80% of the time for it"
    assert describe_ranks([]) == ""
