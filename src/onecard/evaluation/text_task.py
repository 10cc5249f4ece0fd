"""The loss of any model on any text, as a task."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from onecard.data import Batch
from onecard.data.sampler import heldout_blocks
from onecard.errors import DataError
from onecard.evaluation.heldout import measure_blocks, summarize
from onecard.evaluation.task import Result, Subject
from onecard.model.attention import attention_of
from onecard.model.families import find_backend, implementation_of
from onecard.model.generate import check_ids, opening_of
from onecard.model.loss import IGNORE, find_head
from onecard.spec import Score

# Tokens of a block where a model has more positions.
_LONGEST_BLOCK = 2048


class TextLossTask:
    """Loss, perplexity and bits per byte of a text, each token predicted once in blocks that do not overlap.

    Raises:
        DataError: the file cannot be read, is no UTF-8, or is empty.
    """

    name = "loss"
    ranks_by = "loss"
    is_lower_better = True

    def __init__(self, path: Path, *, batch_size: int, limit: int | None) -> None:
        try:
            self._text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(f"--text {path}: it cannot be read ({error.strerror or error}): check the path") from error
        except UnicodeDecodeError as error:
            raise DataError(f"--text {path}: it is no UTF-8 text (byte {error.start}): convert it") from error
        if not self._text:
            raise DataError(f"--text {path}: it is empty: give a text to measure")
        if "\0" in self._text:
            place = len(self._text.partition("\0")[0].encode("utf-8"))
            raise DataError(f"--text {path}: a binary file (NUL byte at offset {place:,}), not text: give a text")
        self._batch_size = batch_size
        self._limit = limit
        self._num_bytes = len(self._text.encode("utf-8"))
        self.num_items = self._num_bytes
        self.fingerprint = hashlib.sha256(self._text.encode("utf-8")).hexdigest()[:16]

    def measure(self, subject: Subject) -> Result:
        """Measures one model."""
        model, tokenizer = subject.model, subject.tokenizer
        opening = opening_of(model, tokenizer)
        ids = [*opening, *tokenizer.encode(self._text, add_special_tokens=False)]
        check_ids(model, [ids])
        length = min(getattr(model.config, "max_position_embeddings", None) or _LONGEST_BLOCK, _LONGEST_BLOCK)
        backend = find_backend(model.config)
        with attention_of(model, implementation_of(model.config, backend)):
            batches = text_batches(ids, length, self._batch_size, self._limit)
            blocks = measure_blocks(model, find_head(model), batches, backend)
        found = summarize(blocks)
        perplexity = math.exp(min(found.loss, 700.0))  # beyond, a float ends
        # Of a part of the text, its share of the bytes is taken to be that of its tokens.
        num_tokens = max(1, len(ids) - 1)
        bits = found.bits_per_byte(num_tokens, self._num_bytes)
        protocol = subject.protocol | {
            "task": "loss of a text",
            "data": self.fingerprint,
            "max_seq_length": length,
            "num_tokens": num_tokens,
            "num_bytes": self._num_bytes,
            "limit": self._limit,
        }
        values = {
            "loss": (found.loss, found.standard_error),
            "perplexity": (perplexity, perplexity * found.standard_error),
            "bits_per_byte": (bits, bits / found.loss * found.standard_error if found.loss else 0.0),
        }
        scores = tuple(
            Score(name=name, value=value, standard_error=error, n=found.num_target_tokens, protocol=protocol)
            for name, (value, error) in values.items()
        )
        return Result(scores, blocks)


def text_batches(ids: Sequence[int], length: int, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """Cuts ids into blocks of up to `length` targets, every id but the first a target once; `limit` spreads evenly."""
    starts, lengths = heldout_blocks(len(ids), length)
    if limit is not None and limit < len(starts):
        chosen = np.arange(limit) * len(starts) // limit
        starts, lengths = starts[chosen], lengths[chosen]
    whole = torch.tensor(ids, dtype=torch.int64)
    for first in range(0, len(starts), batch_size):
        picked = list(zip(starts[first : first + batch_size], lengths[first : first + batch_size], strict=True))
        width = int(max(size for _, size in picked))
        ids_BT = torch.zeros((len(picked), width), dtype=torch.int64)
        targets_BT = torch.full_like(ids_BT, IGNORE)
        for row, (start, size) in enumerate(picked):
            ids_BT[row, :size] = whole[start : start + size]
            targets_BT[row, :size] = whole[start + 1 : start + size + 1]
        yield Batch(ids_BT, targets_BT, None, int(sum(size for _, size in picked)))
