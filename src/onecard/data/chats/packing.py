"""Which conversations of a step share a row, and which rows a micro-batch.

off    a conversation per row       a a a . .   padding at the end, behind everything that counts
                                    b b b b b
rows   conversations share rows     a a a c c   rows of at most max_seq_length tokens, about equally long
                                    b b b b b
flat   one row per micro-batch      a a a b b b b b c c   no padding at all
"""

import heapq
from typing import Literal

import numpy as np

Packing = Literal["off", "rows", "flat"]
PackedRow = list[int]

# Tokens computed per token held. Attention over a mask costs length / (6 width) of all other products, so a row half
# as long gains more than that: 15% at 1,024 tokens and width 576.
_MOST_PADDING = 1.03


def pack(lengths: np.ndarray, capacity: int, rows_per_micro_batch: int, packing: Packing) -> list[list[PackedRow]]:
    """Divides conversations of `lengths` tokens [N] into micro-batches of rows; each is named once, by its index.

    No row is longer than `capacity` (`flat`: than all rows of a micro-batch together), and no micro-batch has more
    than `rows_per_micro_batch` rows. `off` keeps the order given. First-fit decreasing decides how many rows there
    are; then the longest go first to the row that has least, so that rows and micro-batches get about the same work.
    Source: Graham, "Bounds on multiprocessing timing anomalies", 1969. Raises ValueError for a conversation that fits
    no row.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a conversation of {int(lengths.max())} tokens does not fit a row of {capacity}")
    size = rows_per_micro_batch
    if packing == "off":
        rows = [[index] for index in range(len(lengths))]
        return [rows[first : first + size] for first in range(0, len(rows), size)]
    order = np.argsort(-lengths, kind="stable").tolist()
    if packing == "flat":
        return [[row] for row in _share_rows(lengths, order, capacity * size, 1)]
    rows = _share_rows(lengths, order, capacity, size)
    # Neighbours in length share a micro-batch: its width is that of its longest row.
    rows.sort(key=lambda row: -int(lengths[row].sum()))
    count = -(-len(rows) // size)
    return [rows[len(rows) * part // count : len(rows) * (part + 1) // count] for part in range(count)]


def _share_rows(lengths: np.ndarray, order: list[int], capacity: int, rows_per_micro_batch: int) -> list[PackedRow]:
    """Spreads conversations over the most rows that cost no further micro-batch and little padding.

    The shorter the rows, the less attention there is to compute and to mask.
    """
    fitted = _first_fit(lengths, order, capacity)
    num_micro_batches = -(-len(fitted) // rows_per_micro_batch)
    fewest = -(-len(fitted) // num_micro_batches)
    for per_micro_batch in range(rows_per_micro_batch, fewest - 1, -1):
        num_rows = min(num_micro_batches * per_micro_batch, len(order))
        rows = _balance(lengths, order, capacity, num_rows)
        if rows is None:
            continue
        area = num_rows * max(int(lengths[row].sum()) for row in rows)
        if per_micro_batch == fewest or area <= _MOST_PADDING * int(lengths.sum()):
            return rows
    return fitted


def _first_fit(lengths: np.ndarray, order: list[int], capacity: int) -> list[PackedRow]:
    """First-fit decreasing: at most 11/9 of the fewest rows, and 6/9 of a row (Dosa, 2007)."""
    rows = list[PackedRow]()
    room = np.full(len(order), capacity)
    for index in order:
        row = int(np.argmax(room >= lengths[index]))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def _balance(lengths: np.ndarray, order: list[int], capacity: int, num_rows: int) -> list[PackedRow] | None:
    """Gives each conversation, the longest first, to the row that has least; None where one then fits nowhere."""
    rows = [PackedRow() for _ in range(num_rows)]
    loads = [(0, row) for row in range(num_rows)]
    for index in order:
        load, row = loads[0]
        load += int(lengths[index])
        if load > capacity:
            return None
        rows[row].append(index)
        heapq.heapreplace(loads, (load, row))
    return rows
