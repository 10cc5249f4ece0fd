"""How long a step takes that several ranks share: what each computes, and what it waits for the others."""

from dataclasses import dataclass, replace

from onecard.hardware import Card
from onecard.planner.communication import Fabric
from onecard.planner.efficiency import Efficiencies
from onecard.planner.exchange import Exchange, Passes, exchange_of
from onecard.planner.parts import share_of, update_in_parts
from onecard.planner.roofline import StepTime, count_milestones, evaluation_share, predict_time, time_phase
from onecard.planner.trace import Trace
from onecard.spec import Plan


@dataclass(frozen=True)
class GroupTime:
    """The time of all ranks together; `efficiency`: share of so many times the speed of one with its micro-batches."""

    time: StepTime
    exchange: Exchange
    efficiency: float


def predict_group_time(trace: Trace, plan: Plan, card: Card, fabric: Fabric, efficiencies: Efficiencies) -> GroupTime:
    """Predicts a step and the run of `plan` on all cards of a fabric, from the trace of one rank's share of a step."""
    num_ranks = fabric.num_ranks
    share, is_in_parts = share_of(plan, num_ranks), plan.strategy == "fsdp"
    own = update_in_parts(trace, num_ranks) if is_in_parts else trace
    alone = predict_time(own, share, card, efficiencies)
    forward_s, backward_s = (time_phase(own, share, card, efficiencies, phase) for phase in ("forward", "backward"))
    exchange = exchange_of(plan, share, trace, Passes(forward_s, backward_s), fabric)
    step_s = alone.step_s + exchange.exposed_s
    evaluation_s = alone.evaluation_s * evaluation_share(plan, num_ranks)
    num_evaluations, num_saves = count_milestones(plan)
    total_s = plan.schedule.num_steps * step_s + num_evaluations * evaluation_s + num_saves * alone.save_s
    slower = num_ranks * total_s / alone.total_s
    is_communication = exchange.exposed_s > alone.limit_s
    time = replace(
        alone,
        step_s=step_s,
        low_s=min(step_s, alone.low_s + exchange.exposed_low_s),
        high_s=alone.high_s + exchange.exposed_high_s,
        tokens_per_s=plan.tokens_per_step / step_s,
        share_of_peak=alone.share_of_peak * alone.step_s / step_s * _fullness(plan, share, num_ranks),
        limited_by="communication" if is_communication else alone.limited_by,
        limit_s=max(exchange.exposed_s, alone.limit_s),
        evaluation_s=evaluation_s,
        total_s=total_s,
        energy_wh=None if alone.energy_wh is None else (slower * alone.energy_wh[0], slower * alone.energy_wh[1]),
    )
    before_s = time_phase(trace, share, card, efficiencies, "update")
    after_s = time_phase(own, share, card, efficiencies, "update")
    one_card_s = (alone.step_s - after_s) * plan.rows_per_step / share.rows_per_step + before_s
    return GroupTime(time, exchange, one_card_s / (num_ranks * step_s))


def _fullness(plan: Plan, share: Plan, num_ranks: int) -> float:
    """What all ranks compute as a share of what they would if each had as much as the one with the most."""
    return plan.tokens_per_step / (num_ranks * share.tokens_per_step)
