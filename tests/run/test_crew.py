"""Ranks that share work between two steps: what each finds is put together, and what ails one is told to the leader."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard.data.tokenizer import train_tokenizer
from onecard.distributed.place import Place
from onecard.distributed.ranks import Ranks
from onecard.evaluation.work import Continuations, Likelihoods, Work
from onecard.model.generate import Sampling
from onecard.run.clock import Clock
from onecard.run.control import Control
from onecard.run.crew import Crew, InterruptedWorkError
from onecard.training.state import TrainState

NUM_RANKS = 3
PROMPTS = [[1 + index, 5, 9][: 1 + index % 3] for index in range(7)]
GREEDY = Sampling(6, temperature=0)


class Table:
    """Where ranks that are threads lay down what they say."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(NUM_RANKS, timeout=30)
        self.said: dict[int, Any] = {}

    def lay(self, rank: int, said: Any) -> list[Any]:
        self.said[rank] = said
        self.barrier.wait()
        found = [self.said[rank] for rank in range(NUM_RANKS)]
        self.barrier.wait()
        return found


class AtTable(Ranks):
    """Ranks in threads of one process; `is_patient`: whether they should wait for one another without an end."""

    is_patient = True

    def __init__(self, rank: int, table: Table) -> None:
        super().__init__(Place(rank, NUM_RANKS, rank, NUM_RANKS))
        self._table = table

    def gather_texts(self, text: str, *, is_patient: bool = False) -> list[str]:
        return self._in_one_group(text, is_patient)

    def hear_leader(self, text: str = "", *, is_patient: bool = False) -> str:
        return self._in_one_group(text, is_patient)[0]

    def _in_one_group(self, text: str, is_patient: bool) -> list[str]:
        told = self._table.lay(self.place.rank, (text, is_patient))
        assert {patient for _, patient in told} == {self.is_patient}
        return [text for text, _ in told]

    def take_leaders(self, tensor: Tensor) -> None:
        leaders: Tensor = self._table.lay(self.place.rank, tensor.detach())[0]
        with torch.no_grad():
            tensor.copy_(leaders.clone())


@pytest.fixture
def crews(tiny_state: Callable[..., TrainState]) -> list[Crew]:
    table, tokenizer = Table(), train_tokenizer("bytes", ())
    found = []
    for rank in range(NUM_RANKS):
        state = tiny_state("llama", seed=3, optimizer="adamw")
        state.ranks = AtTable(rank, table)
        state.plan = state.plan.model_copy(update={"eval_tasks": ("choice",)})
        found.append(Crew(state, tokenizer, Clock(0.0), Control()))
    return found


@contextmanager
def following(crews: list[Crew]) -> Iterator[Crew]:
    """Lets the others follow the first of them, which rejoins them in the end."""
    errors: list[BaseException] = []

    def follow(crew: Crew) -> None:
        try:
            crew.rejoin()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=follow, args=(crew,), daemon=True) for crew in crews[1:]]
    for thread in threads:
        thread.start()
    yield crews[0]
    crews[0].rejoin()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert not errors


def join_all(crews: list[Crew], own: list[list[int] | None]) -> list[Any]:
    """What each rank gets where all join their shares, or how it failed."""
    found: list[Any] = [None] * NUM_RANKS

    def join(rank: int) -> None:
        try:
            found[rank] = crews[rank].join(own[rank])
        except MemoryError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(NUM_RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return found


def works() -> list[Work]:
    pairs = [(prompt, [index % 4 + 1, 3][: 1 + index % 2]) for index, prompt in enumerate(PROMPTS)]
    return [
        Continuations(PROMPTS, [0], GREEDY, 2),
        Continuations(PROMPTS[:2], [0], GREEDY, 16, until=["x"]),
        Likelihoods(pairs, 16, 2),
        Likelihoods([], 16, 2),
        Continuations(PROMPTS, [0], Sampling(6, temperature=1.0, seed=5), 2),
    ]


@pytest.mark.parametrize("index", range(5))
def test_what_is_shared_is_what_one_process_finds(index: int, crews: list[Crew]) -> None:
    work = works()[index]
    alone = work.do(crews[0].state.model, crews[0].tokenizer, lambda done, total: None)
    heard: list[tuple[int, int]] = []
    with following(crews) as leader:
        found = leader.perform(work, lambda done, total: heard.append((done, total)))
    if isinstance(work, Likelihoods):
        assert [verdict for _, verdict in found] == [verdict for _, verdict in alone]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in alone], rel=1e-5)
    else:
        assert found == alone
        assert len({tuple(new) for new in found}) > 1
    assert crews[0].state.model.training  # dropout stays on for the steps to come
    # Of the items the leader has done its own.
    own = -(-len(work.items) // NUM_RANKS)
    assert heard[-1:] == [(own, own)][:own]


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_a_rank_without_memory_is_told_to_the_leader(rank: int, crews: list[Crew]) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = crews[rank].state.model.get_input_embeddings().register_forward_pre_hook(refuse)
    with following(crews) as leader:
        with pytest.raises(MemoryError, match=rf"CUDA out of memory \(rank {rank} of 3\)"):
            leader.perform(works()[2], lambda done, total: None)
        hook.remove()
        assert len(leader.perform(works()[2], lambda done, total: None)) == len(PROMPTS)


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_a_rank_that_is_asked_to_stop_stops_all(rank: int, crews: list[Crew]) -> None:
    crews[rank].control.stop = True
    with following(crews) as leader, pytest.raises(InterruptedWorkError):
        leader.perform(works()[0], leader.refuse_interrupted)
    assert crews[0].control.stop


def test_all_take_the_weights_of_the_leader(crews: list[Crew], tmp_path: Path) -> None:
    trained = crews[0].state.model
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(3.0)
    trained.save_pretrained(tmp_path)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(2.0)
    with following(crews) as leader:
        leader.load_weights(tmp_path)
    first, *others = [dict(crew.state.model.named_parameters()) for crew in crews]
    for other in others:
        for name, weight in first.items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=0)
            assert weight.numel() == 0 or not torch.equal(weight, weight * 2.0)


def test_samples_are_joined_in_their_order_and_none_goes_missing(crews: list[Crew]) -> None:
    shares = [crew.share(range(7)) for crew in crews]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]

    assert join_all(crews, list(shares)) == [list(range(7))] * NUM_RANKS
    assert join_all(crews, [shares[0], None, shares[2]]) == ["no memory (rank 1 of 3)"] * NUM_RANKS


def test_who_hangs_where_nothing_takes_long_is_not_waited_for_without_an_end(crews: list[Crew]) -> None:
    plain = []
    for crew in crews:
        crew.state.plan = crew.state.plan.model_copy(update={"eval_tasks": ()})
        crew.state.ranks.is_patient = False  # type: ignore[attr-defined]
        plain.append(Crew(crew.state, crew.tokenizer, crew.clock, crew.control))
    assert join_all(plain, [[rank] for rank in range(NUM_RANKS)]) == [list(range(NUM_RANKS))] * NUM_RANKS
    with following(plain):
        pass
