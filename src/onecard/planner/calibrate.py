"""From runs that were measured on a card to the efficiencies that explain them.

    predicted seconds by kind    gemm ■■■■■■  pointwise ■■■  ...          measured step
                                      │ x a            │ x b                   │
                                      └───────── sum ──┴──── as near as it gets ┘

Every factor is drawn towards 1 unless runs speak against it, so that one run moves what it spends its time on and
leaves the rest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from onecard.planner.efficiency import Efficiencies

# How far the logarithm of a share is thought to be off before anything was measured, and that of one measured step.
_PRIOR_SPREAD = 0.3
_NOISE = 0.03
_ROUNDS = 30
# However well past runs are explained, the next one may do something new.
_LEAST_SPREAD = 0.08
_SHARES = tuple(field.name for field in fields(Efficiencies) if field.name.startswith(("gemm", "flash", "efficient")))
_CLASSES = (*_SHARES, "pointwise", "reduction", "optimizer", "embedding", "copy", "fused")


@dataclass(frozen=True)
class Measured:
    """A step that ran, in seconds, and `StepTime.seconds` as predicted for it by the efficiencies to be corrected.

    Only runs that wait for the card tell of it; those limited by Python are left out.
    """

    step_s: float
    seconds: Mapping[str, float]

    @property
    def waits_for_card(self) -> bool:
        return not self.seconds.get("launches") and self.step_s > 0


def calibrate(default: Efficiencies, measured: Sequence[Measured]) -> Efficiencies:
    """Scales efficiencies so that predicted steps meet measured ones: least squares on logarithms, drawn to `default`.

    The band shrinks to what stays unexplained. Without usable runs `default` comes back.
    """
    runs = [run for run in measured if run.waits_for_card]
    names = [name for name in _CLASSES if any(run.seconds.get(name, 0.0) > 0 for run in runs)]
    if not names:
        return default
    seconds = np.array([[run.seconds.get(name, 0.0) for name in names] for run in runs])
    target = np.log([run.step_s for run in runs])
    logs = _fit(seconds, target)
    residuals = target - np.log(seconds @ np.exp(logs))
    spread = max(_LEAST_SPREAD, 2 * float(np.sqrt(np.mean(residuals**2))))
    # Few runs say little about the next: a band of one is the default's, halved with every four times as many.
    weight = 1 / math.sqrt(len(runs) + 1)
    scaled = {name: getattr(default, name) * math.exp(-log) for name, log in zip(names, logs, strict=True)}
    return replace(
        default,
        **scaled,
        low=math.exp(-spread - weight * (-math.log(default.low))),
        high=math.exp(spread + weight * math.log(default.high)),
    )


def _fit(seconds: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Logarithms of the factors of each class, by Gauss-Newton steps from none."""
    logs = np.zeros(seconds.shape[1])
    prior = np.eye(len(logs)) / _PRIOR_SPREAD**2
    for _ in range(_ROUNDS):
        scaled = seconds * np.exp(logs)
        total = scaled.sum(1)
        slopes = scaled / total[:, None]
        errors = target - np.log(total)
        gradient = slopes.T @ errors / _NOISE**2 - prior @ logs
        logs = logs + np.linalg.solve(slopes.T @ slopes / _NOISE**2 + prior, gradient)
    return logs
