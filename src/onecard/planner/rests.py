"""The time of a plan that rests between its steps (`max_power_share`)."""

from onecard.spec import Plan, TimeForecast


def stretched_s(seconds: float, plan: Plan) -> float:
    """Seconds that some computing takes with the rests between."""
    return seconds / (plan.max_power_share or 1.0)


def with_rests(time: TimeForecast, plan: Plan) -> TimeForecast:
    """Adds its rests to the forecast of a plan; what one evaluation or checkpoint takes holds none."""
    share = plan.max_power_share
    if share is None or share == 1.0:
        return time
    energy = "" if time.energy_wh is None else "; energy without what the card draws meanwhile"
    note = f"max_power_share {share:.4g}: rests for {1 - share:.0%} of the time{energy}"
    return time.model_copy(
        update={
            "step_s": stretched_s(time.step_s, plan),
            "step_low_s": stretched_s(time.step_low_s, plan),
            "step_high_s": stretched_s(time.step_high_s, plan),
            "total_s": stretched_s(time.total_s, plan),
            "tokens_per_s": share * time.tokens_per_s,
            "share_of_peak": share * time.share_of_peak,
            "note": "; ".join(text for text in (note, time.note) if text),
        }
    )
