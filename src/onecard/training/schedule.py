"""The learning rate as a function of progress."""

import importlib
import math
import sys
from collections.abc import Callable

from onecard.errors import InputError
from onecard.spec import SchedulePlan

Shape = Callable[[float], float]


def rate_at(plan: SchedulePlan, step: int) -> float:
    """Share of the peak learning rate for the update that follows `step` finished ones (0 <= step < num_steps)."""
    if step < plan.num_warmup_steps:
        return (step + 1) / plan.num_warmup_steps
    num_rest = max(1, plan.num_steps - plan.num_warmup_steps)
    progress = min(1.0, (step - plan.num_warmup_steps) / num_rest)
    share = find_shape(plan.name, plan.num_decay_steps / num_rest)(progress)
    return plan.min_lr_ratio + (1 - plan.min_lr_ratio) * share


def find_shape(name: str, decay_share: float = 1.0) -> Shape:
    """Finds a schedule by name: a function from progress (0 to 1, after warmup) to a share of the peak rate.

    `decay_share` is the last part of the run in which `wsd` decays. `module:function` names one of the user's own.

    Raises:
        InputError: the module cannot be imported or has no such function.
    """
    if name == "wsd":
        return lambda progress: min(1.0, (1 - progress) / max(decay_share, 1e-9))
    if name in _SHAPES:
        return _SHAPES[name]
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # an installed command does not look into the current folder by itself
    try:
        shape: Shape = getattr(importlib.import_module(module_name), function_name)
        if not all(math.isfinite(shape(progress)) for progress in (0.0, 0.5, 1.0)):
            raise TypeError("it does not give a finite number")
    except Exception as error:  # whatever the user's own code raises
        raise InputError(
            f"lr_scheduler_type {name!r} cannot be used: {error}. Give {', '.join(('wsd', *_SHAPES))}, or "
            "module:function where the module can be imported from the current folder"
        ) from error
    return shape


_SHAPES: dict[str, Shape] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
