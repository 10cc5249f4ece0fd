"""How many chats there are and how long, without preparing them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from onecard.data.chats.corpus import ChatRequest
from onecard.data.chats.rows import list_chat_files, open_chat_files
from onecard.data.row_files import Row
from onecard.data.sources import Source
from onecard.errors import DataError

_ROWS_LOOKED_AT = 256
# UTF-8 bytes of a row, marks included, per token of its conversation: 4.1 to 4.6 on five sets of English and Chinese.
_BYTES_PER_TOKEN = 4.4
# Where nothing can be told: a data set of the Hub that is not here.
_ASSUMED_ROWS, _ASSUMED_TOKENS = 10_000, 300
# `train[:4096]` or `train[100:200]`, as `datasets` cuts a split.
_SLICE = re.compile(r"[\w.-]+\[(\d*):(\d+)\]")


@dataclass(frozen=True)
class ChatSurvey:
    """Sizes of chats that were not prepared. `is_assumed`: nothing of some source could be looked at."""

    num_train_rows: int
    num_train_tokens: int
    num_heldout_tokens: int
    is_assumed: bool


def survey_chats(request: ChatRequest) -> ChatSurvey:
    """Estimates chats from the first rows and the size of their files; those of the Hub by their slice of a split."""
    train = [_estimate(source, request.max_seq_length) for source in request.sources]
    heldout = [_estimate(source, request.max_seq_length) for source in request.eval_sources]
    num_rows, num_tokens = sum(rows for rows, _, _ in train), sum(tokens for _, tokens, _ in train)
    num_heldout = sum(tokens for _, tokens, _ in heldout)
    if not request.eval_sources:
        num_heldout = int(num_tokens * request.eval_fraction)
        num_rows, num_tokens = round(num_rows * (1 - request.eval_fraction)), num_tokens - num_heldout
    return ChatSurvey(max(1, num_rows), max(1, num_tokens), num_heldout, any(one[2] for one in (*train, *heldout)))


def _estimate(source: Source, max_tokens: int) -> tuple[int, int, bool]:
    """Rows and tokens of a source, and whether they are assumed."""
    try:
        files = list_chat_files(source).files
        rows = [] if not files else list(islice(_rows(source), _ROWS_LOOKED_AT))
        size_bytes = sum(file.path.stat().st_size for file in files)
    except (DataError, OSError):
        files, rows, size_bytes = (), [], 0
    if not rows:
        sliced = _SLICE.fullmatch(source.split)
        num_rows = int(sliced[2]) - int(sliced[1] or 0) if sliced else _ASSUMED_ROWS
        return num_rows, num_rows * min(_ASSUMED_TOKENS, max_tokens), True
    sizes = [len(json.dumps(row.value, ensure_ascii=False, default=str).encode("utf-8", "replace")) for row in rows]
    num_rows = len(rows) if len(rows) < _ROWS_LOOKED_AT else max(len(rows), round(size_bytes * len(rows) / sum(sizes)))
    per_row = sum(min(max_tokens, size / _BYTES_PER_TOKEN) for size in sizes) / len(sizes)
    return num_rows, round(num_rows * per_row), False


def _rows(source: Source) -> Iterator[Row]:
    for file in open_chat_files(source):
        for row in file.rows:
            if isinstance(row, Row):
                yield row
