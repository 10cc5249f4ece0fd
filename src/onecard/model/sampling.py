"""How the next token of a text is chosen, and when a text is over."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onecard.errors import InputError

# Logits divided by less than this leave the range of fp32.
_LEAST_TEMPERATURE = 1e-4


# Whether what has been generated is complete.
IsOver = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuses values without a meaning.

        Raises:
            InputError: every such value, together.
        """
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {self.max_new_tokens}: give 1 or more")
        if not (self.temperature == 0 or _LEAST_TEMPERATURE <= self.temperature < math.inf):
            problems.append(
                f"temperature is {self.temperature}: give 0 (the likeliest token) or at least {_LEAST_TEMPERATURE}"
            )
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed is {self.seed}: give a number from 0 to 2^63 - 1")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k is {self.top_k}: give 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}: give a share above 0 and at most 1")
        if problems:
            raise InputError("\n".join(problems))

    def keywords(self) -> dict[str, bool | int | float]:
        """The same for transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": self.top_p or 1.0,
        }
