"""What of a set of chats is learned, and what is wrong with it: shown before the first step."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _as_utf8(value: object) -> object:
    # Names of files and texts of rows may hold half a surrogate pair, which nothing can print.
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


Shown = Annotated[str, BeforeValidator(_as_utf8)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BadPlace(_Frozen):
    """A row that cannot be used: its place (`chats.jsonl:17`) and why."""

    origin: Shown
    reason: Shown


class SkippedRows(_Frozen):
    """Rows that cannot be used for one kind of reason: how many there are, and the first of them."""

    kind: str
    num_rows: int
    places: tuple[BadPlace, ...]


class SampleRow(_Frozen):
    """A conversation as it is learned: pieces of text in order, each with whether its tokens count."""

    origin: Shown
    spans: tuple[tuple[str, bool], ...]


class SourceFormats(_Frozen):
    """Which formats the files of a source were recognised as."""

    path: Shown
    formats: tuple[str, ...]


class RowLengths(_Frozen):
    """Tokens per conversation."""

    median: int = 0
    percentile_95: int = 0
    longest: int = 0


class MaskAudit(_Frozen):
    """The result of looking at every conversation before training.

    Rows, tokens, targets and lengths are those to train on; `num_heldout_rows` are kept out of it. What was skipped,
    cut or looks wrong is counted over everything that was read. `num_rows_in_heldout` are rows to train on whose turns
    are also in the held-out data; `num_duplicate_rows` are those that repeat another one; `num_partial_rows` have a
    system prompt, tools, calls of tools or reasoning that the template does not show; `num_spared_rows` are held out
    although the fraction drew none of their source; `num_empty_system_rows` lost an empty turn of the system.
    `new_tokens` were added to the vocabulary for the template.
    """

    template: str
    formats: tuple[SourceFormats, ...]
    num_rows: int
    num_tokens: int
    num_target_tokens: int
    num_heldout_rows: int
    num_heldout_target_tokens: int
    num_spared_rows: int = 0
    lengths: RowLengths
    skipped: tuple[SkippedRows, ...] = ()
    num_cut_rows: int = 0
    num_dropped_rounds: int = 0
    num_lost_tokens: int = 0
    num_double_bos_rows: int = 0
    num_rows_without_stop: int = 0
    num_partial_rows: int = 0
    num_empty_system_rows: int = 0
    num_duplicate_rows: int = 0
    num_rows_in_heldout: int = 0
    new_tokens: tuple[Shown, ...] = ()
    samples: tuple[SampleRow, ...] = ()

    @property
    def target_share(self) -> float:
        """Share of the tokens that count."""
        return self.num_target_tokens / max(1, self.num_tokens)

    @property
    def num_skipped_rows(self) -> int:
        return sum(skipped.num_rows for skipped in self.skipped)
