"""Work of ranks that make their passes together: nobody is waited for in vain."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from onecard.distributed.place import Place
from onecard.distributed.ranks import Ranks
from onecard.errors import DoesNotFitError
from onecard.evaluation.work import Continuations
from onecard.model.generate import Sampling
from onecard.training.in_step import do_in_step
from onecard.training.state import TrainState

PROMPTS = [[3, 5], [4, 6, 7], [1]]


class WithAnother(Ranks):
    """Two ranks, of which the other one makes so many passes."""

    def __init__(self, num_passes: int) -> None:
        super().__init__(Place(0, 2, 0, 2))
        self.said: list[int] = []
        self._num_passes = num_passes

    def largest(self, value: int) -> int:
        self.said.append(value)
        return max(value, int(len(self.said) <= self._num_passes))


@pytest.fixture
def state(tiny_state: Callable[..., TrainState]) -> TrainState:
    return tiny_state("llama", seed=3, optimizer="adamw")


def count_passes(state: TrainState) -> list[tuple[int, ...]]:
    """Lists the shapes of ids of all passes from now on."""
    shapes: list[tuple[int, ...]] = []

    def note(module: Any, args: Any, keywords: dict[str, Any], output: Any) -> None:
        shapes.append(tuple(keywords["input_ids"].shape))

    state.model.base_model.register_forward_hook(note, with_kwargs=True)
    return shapes


def write(state: TrainState, batch_size: int = 2) -> list[list[int]]:
    work = Continuations(PROMPTS, [0], Sampling(5, temperature=0), batch_size)
    return work.do(state.model, None, lambda done, total: None)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("num_more", [0, 4])
def test_who_is_done_goes_on_with_the_others(num_more: int, state: TrainState) -> None:
    alone = write(state)
    shapes = count_passes(state)
    write(state)
    own = list(shapes)
    shapes.clear()
    state.ranks = ranks = WithAnother(len(own) + num_more)

    assert do_in_step(state, lambda: write(state)) == alone

    assert shapes == own + [(1, 1)] * num_more
    assert ranks.said == [1] * len(own) + [0] * (num_more + 1)
    assert state.model.training
    write(state)  # which nobody hears of any more
    assert len(ranks.said) == len(own) + num_more + 1


@torch.no_grad()
def test_what_fails_between_passes_is_raised_when_all_are_done(state: TrainState) -> None:
    state.ranks = ranks = WithAnother(6)
    shapes = count_passes(state)

    def fail() -> None:
        raise MemoryError("none for the texts")

    with pytest.raises(MemoryError, match="none for the texts"):
        do_in_step(state, fail)
    assert ranks.said == [0] * 7
    assert shapes[-6:] == [(1, 1)] * 6


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])  # with two the work tries again, one at a time
def test_memory_that_runs_out_within_a_pass_is_not_tried_again(batch_size: int, state: TrainState) -> None:
    write(state)  # so that it is known how the model is run
    state.ranks = ranks = WithAnother(20)

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    state.model.base_model.layers[1].register_forward_pre_hook(refuse)
    with pytest.raises(DoesNotFitError, match="in a pass that all processes make together") as found:
        do_in_step(state, lambda: write(state, batch_size))
    assert found.value.__cause__ is None  # else it would be taken for a shortage that one may do without
    assert ranks.said == [1]  # the others cannot hear anything now
