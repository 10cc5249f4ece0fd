"""Processes of one run that do not keep up with one another."""

from collections.abc import Sequence

from onecard.observe.detectors.catalogue import make_finding
from onecard.observe.detectors.history import History, mean, median
from onecard.observe.detectors.phrases import phrase
from onecard.observe.events import RanksEvent
from onecard.spec import Finding

_NUM_LOOKS, _LEAST_LOOKS = 6, 3
# Processes on one machine differ by some percent all the time.
_SLOW_RATIO = 1.25
_LEAST_WAITING = 0.1
_DATA_SHARE = 0.3


def find_slow_rank(history: History) -> Finding | None:
    looks = history.ranks[-_NUM_LOOKS:]
    if not history.is_long_enough() or len(looks) < _LEAST_LOOKS:
        return None
    # By what each had to do: a rank with longer chats is no slower one.
    each = [median(values) for values in zip(*map(_needed_s, looks), strict=True)]
    slowest = max(range(len(each)), key=each.__getitem__)
    others = [seconds for rank, seconds in enumerate(each) if rank != slowest]
    ratio = each[slowest] / max(median(others), 1e-12)
    waited = mean([_share_of_others(look, slowest) for look in looks])
    if ratio < _SLOW_RATIO or waited < _LEAST_WAITING:
        return None
    step_s = mean([look.step_s for look in looks])
    evidence = [
        phrase("slow-rank", rank=slowest, ratio=f"{ratio:.2f}", num=sum(look.num_steps for look in looks)),
        phrase("ranks-wait", share=f"{waited:.0%}", each=f"{step_s:.3g}"),
    ]
    data = mean([look.data_s[slowest] / max(look.step_s, 1e-9) for look in looks])
    if data >= _DATA_SHARE:
        evidence.append(phrase("rank-waits-for-data", share=f"{data:.0%}"))
    effect = phrase("without-waiting", seconds=f"{step_s * (1 - waited):.3g}")
    return make_finding("slow-rank", "; ".join(evidence), "", effect=effect)


def _needed_s(look: RanksEvent) -> Sequence[float]:
    """Seconds that each rank needs for a token."""
    return [busy / max(tokens, 1.0) for busy, tokens in zip(look.busy_s, look.num_tokens, strict=True)]


def _share_of_others(look: RanksEvent, slowest: int) -> float:
    return mean([share for rank, share in enumerate(look.waiting_shares) if rank != slowest])
