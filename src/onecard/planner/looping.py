"""Families whose code goes from token to token in Python: traced over shorter rows, and as many more of them.

24 layers over 512 tokens would be traced for ten minutes. Half as long rows, twice as many, hold as many tokens: what
is kept for the backward pass stays as large, and as many numbers are computed; of what the loops launch there is half,
each twice as large. A state that every row begins with counts more often: about a part in `_LEAST_LENGTH`.
"""

import json
from functools import lru_cache
from typing import Any

from onecard.model.build import make_config
from onecard.model.families import loops_over_tokens
from onecard.spec import Plan

# Seconds of a core for one pass of a layer over one token (0.007 to 0.011, by two plans and a profile).
_LOOPED_TOKEN_S = 0.01
_ENOUGH_S = 5.0
_LEAST_LENGTH = 8


def num_layers_of(settings: dict[str, Any]) -> int:
    """Number of layers of a model with these settings."""
    return _num_layers(json.dumps(settings, sort_keys=True))


@lru_cache(maxsize=8)
def _num_layers(settings_json: str) -> int:
    return int(make_config(json.loads(settings_json)).num_hidden_layers)


def seconds_to_trace(plan: Plan) -> float:
    """Estimates seconds of a core for tracing a plan as it stands; 0 where many tokens are computed at a time."""
    if not loops_over_tokens(plan.model.settings["model_type"]):
        return 0.0
    # Forward and backward of the micro-batches that are traced, and an evaluation.
    num_passes = 1 + 2 * min(2, plan.num_micro_batches)
    return _LOOPED_TOKEN_S * num_layers_of(plan.model.settings) * plan.max_seq_length * num_passes


def find_shortening(plan: Plan) -> int:
    """By how much the rows of a plan are shorter, and more, where it is traced; 1 for most."""
    seconds, factor = seconds_to_trace(plan), 1
    while seconds / factor > _ENOUGH_S and plan.max_seq_length % (2 * factor) == 0:
        if plan.max_seq_length // (2 * factor) < _LEAST_LENGTH:
            break
        factor *= 2
    return factor


def shorten(plan: Plan) -> Plan:
    """The plan as it is traced."""
    factor = find_shortening(plan)
    if factor == 1:
        return plan
    sizes = ("micro_batch_size", "total_batch_size", "eval_batch_size")
    changes = {name: getattr(plan, name) * factor for name in sizes}
    return plan.model_copy(update=changes | {"max_seq_length": plan.max_seq_length // factor})


def launches_of(num_calls: int, plan: Plan) -> int:
    """How often Python launches, over rows as long as planned, what the trace of shorter ones has so often."""
    factor = find_shortening(plan)
    if factor == 1:
        return num_calls
    is_in_loop = num_calls >= plan.max_seq_length // factor * num_layers_of(plan.model.settings)
    return num_calls * factor if is_in_loop else num_calls


def explain_shortening(plan: Plan) -> str | None:
    """Says how a plan was traced, where it was not as it stands."""
    factor = find_shortening(plan)
    if factor == 1:
        return None
    return (
        f"{plan.model.settings['model_type']} goes from token to token in Python: traced over rows of "
        f"{plan.max_seq_length // factor} tokens, {factor} times as many"
    )
