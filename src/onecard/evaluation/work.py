"""What a task asks of a model: items in ids, which several processes can share, for none depends on another."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.model.attention import attention_of
from onecard.model.decoder import Decoder
from onecard.model.generate import AtOnce, Sampling, complete_ids, plainly
from onecard.model.loss import find_head, score_tokens
from onecard.model.shortage import is_out_of_memory, release_memory

# A text to stop at may be spread over so many of the last tokens.
_NUM_TAIL_TOKENS = 16

# Hears how many items are done, and of how many; it may raise to end the work.
Report = Callable[[int, int], None]
Ids = Sequence[int]


@dataclass(frozen=True)
class Continuations:
    """Prompts to be continued, until a stop id, after one of the words `until`, or as far as `sampling` lets them.

    Finds the new ids of each. What is drawn for one depends on none that is continued beside it. A batch that does not
    fit the memory is halved.
    """

    items: Sequence[Ids]
    stop_ids: Sequence[int]
    sampling: Sampling
    batch_size: int
    until: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.sampling.temperature and self.sampling.streams is None:
            object.__setattr__(self, "sampling", replace(self.sampling, streams=tuple(range(len(self.items)))))

    def take(self, share: slice) -> Self:
        """Gives the same work with some of its items."""
        return self._with(range(len(self.items))[share])

    def _with(self, indices: Sequence[int]) -> Self:
        sampling = self.sampling
        if sampling.streams is not None:
            sampling = replace(sampling, streams=tuple(sampling.streams[index] for index in indices))
        return replace(self, items=[self.items[index] for index in indices], sampling=sampling)

    def do(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: Report) -> list[list[int]]:
        """Gives the new ids of each prompt."""
        done, batch_size = dict[int, list[int]](), self.batch_size

        def is_over(new: Ids) -> bool:
            tail = tokenizer.decode(new[-_NUM_TAIL_TOKENS:])
            return any(word and word in tail for word in self.until)

        while waiting := [index for index in range(len(self.items)) if index not in done]:

            def end(place: int, new: list[int], waiting: list[int] = waiting) -> None:
                done[waiting[place]] = new
                report(len(done), len(self.items))

            rest, ends = self._with(waiting), is_over if self.until else None
            try:
                complete_ids(model, rest.items, self.stop_ids, rest.sampling, ends, at_once=AtOnce(batch_size, end))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or batch_size == 1:
                    raise
                batch_size = min(batch_size, len(waiting)) // 2
                release_memory(model.device)
        return [done[index] for index in range(len(self.items))]


@dataclass(frozen=True)
class Likelihoods:
    """Pairs of a context and what goes on with it; of both together the last `max_length` ids and one are looked at.

    Finds of each the sum of log-likelihoods of what goes on, and whether each token of it is the likeliest.
    """

    items: Sequence[tuple[Ids, Ids]]
    max_length: int
    batch_size: int

    def take(self, share: slice) -> Self:
        """Gives the same work with some of its items."""
        return replace(self, items=self.items[share])

    @torch.no_grad()
    def do(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: Report
    ) -> list[tuple[float, bool]]:
        """Gives the sum and the verdict of each pair."""
        order = sorted(range(len(self.items)), key=lambda index: -sum(map(len, self.items[index])))
        found: dict[int, tuple[float, bool]] = {}
        with plainly(model), attention_of(model, "sdpa"):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                found.update(zip(batch, self._score(model, [self.items[index] for index in batch]), strict=True))
                report(len(found), len(order))
        return [found[index] for index in range(len(order))]

    def _score(self, model: PreTrainedModel, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Scores each continuation; padding stands on the right, where causal attention never looks."""
        rows = [[*context, *continuation][-(self.max_length + 1) :] for context, continuation in pairs]
        counts = [min(len(continuation), len(row) - 1) for (_, continuation), row in zip(pairs, rows, strict=True)]
        longest = max(map(len, rows)) - 1
        device = model.get_input_embeddings().weight.device
        ids_BT = torch.tensor([row[:-1] + [0] * (longest + 1 - len(row)) for row in rows], device=device)
        hidden_ND = Decoder(model, compiled=False)(ids_BT, None)
        places = [
            index * longest + len(row) - 1 - count + offset
            for index, (row, count) in enumerate(zip(rows, counts, strict=True))
            for offset in range(count)
        ]
        targets = [token for row, count in zip(rows, counts, strict=True) for token in row[-count:]]
        hidden_nD = hidden_ND.index_select(0, torch.tensor(places, device=device))
        scores_N, verdicts_N = score_tokens(hidden_nD, find_head(model), torch.tensor(targets, device=device))
        parts = zip(scores_N.double().cpu().split(counts), verdicts_N.cpu().split(counts), strict=True)
        return [(float(scores.sum()), bool(verdicts.all())) for scores, verdicts in parts]


Work = Continuations | Likelihoods
# What is found of each item, in their order, for a `Report` that hears of those that this process does.
Perform = Callable[[Work, Report], list[Any]]


def write_work(work: Work) -> str:
    """Writes work down for another process."""
    return json.dumps({"kind": type(work).__name__} | asdict(work))


def read_work(text: str) -> Work:
    """Reads what another process has written."""
    fields = json.loads(text)
    if fields.pop("kind") == Likelihoods.__name__:
        return Likelihoods(**fields)
    return Continuations(**fields | {"sampling": Sampling(**fields["sampling"])})
