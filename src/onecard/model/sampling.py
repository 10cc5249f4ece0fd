"""How the next token of a text is chosen, and when a text is over."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.errors import InputError

# Logits divided by less than this leave the range of fp32.
_LEAST_TEMPERATURE = 1e-4


# Whether what has been generated is complete.
IsOver = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest.

    With `streams`, a number for each text, a text draws from a stream of its own, which seed and number decide: it is
    the same whichever texts are written beside it. Without, all draw from one.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    streams: tuple[int, ...] | None = None

    def stream_of(self, index: int) -> random.Random | None:
        """The stream of the text of this index; None where it has none of its own."""
        # A text as seed goes through SHA-512: neighbours have nothing in common.
        return None if self.streams is None else random.Random(f"{self.seed}/{self.streams[index]}")

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


def draw_each(scores_RV: Tensor, streams: Sequence[random.Random]) -> list[int]:
    """Draws a token for each row of scores, each from its own stream."""
    # One number a row against the sums of shares, on any device; in float64, or rounding would move the borders.
    sums_RV = scores_RV.double().softmax(-1).cumsum(-1)
    drawn_R1 = torch.tensor([[stream.random()] for stream in streams], dtype=torch.float64, device=sums_RV.device)
    # The share of all may come to a little more or less than one, and no token lies beyond it.
    found_R1 = torch.searchsorted(sums_RV, drawn_R1 * sums_RV[:, -1:], right=True)
    return list(found_R1.clamp_(max=sums_RV.shape[1] - 1)[:, 0].tolist())
