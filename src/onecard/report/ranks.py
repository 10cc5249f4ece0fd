"""How the processes of a run kept up with one another, for its report."""

from dataclasses import dataclass

from onecard.observe.events import RanksEvent
from onecard.report.record import RunRecord
from onecard.report.words import Say


@dataclass(frozen=True)
class RankRows:
    """A row for each rank: its number, seconds a step of own work, of waiting for data, share of waiting for others."""

    rows: tuple[tuple[str, str, str, str], ...]
    note: str


def tell_ranks(run: RunRecord, say: Say) -> RankRows | None:
    """Tabulates the means over a run; None where it was one process. After another start, of the last ranks alone."""
    looks = run.of(RanksEvent)
    looks = [look for look in looks if len(look.forward_s) == len(looks[-1].forward_s)]
    if not looks:
        return None
    num_steps = sum(look.num_steps for look in looks)

    def mean(values: list[float]) -> float:
        return sum(look.num_steps * value for look, value in zip(looks, values, strict=True)) / num_steps

    rows, waited = [], []
    for rank in range(len(looks[0].forward_s)):
        data_s = mean([look.data_s[rank] for look in looks])
        busy_s = mean([look.busy_s[rank] for look in looks])
        waited.append(mean([look.waiting_shares[rank] for look in looks]))
        rows.append((str(rank), _seconds(busy_s - data_s), _seconds(data_s), f"{waited[-1]:.1%}"))
    slowest = waited.index(min(waited))
    note = say(
        "Rank {rank} was the slowest; the others waited up to {share} of a step for it.",
        rank=slowest,
        share=f"{max(waited):.0%}",
    )
    return RankRows(tuple(rows), note)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
