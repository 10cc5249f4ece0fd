"""A model handed over: what is known of where it comes from, and what was written."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from onecard.spec.score import CheckpointScores

ExportFormat = Literal["hf", "merged", "gguf", "adapter"]
ExportDtype = Literal["f32", "bf16", "fp16", "q8_0"]
UNKNOWN = "unknown"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecord(_Frozen):
    """A source that a model learned from; `sha256` is that of its files now, None where they are not here."""

    name: str
    sha256: str | None = None
    license: str = UNKNOWN


class Provenance(_Frozen):
    """Where a model comes from. What no record tells is None or `unknown`, never guessed.

    `base` is the existing model that training began with, `corpus_fingerprint` the hash of the prepared data as it was
    trained on. `heldout_loss` is in nats per target token.
    """

    name: str
    checkpoint: str | None = None
    step: int | None = None
    method: str | None = None
    base: str | None = None
    base_fingerprint: str | None = None
    base_license: str = UNKNOWN
    data: tuple[DataRecord, ...] = ()
    corpus_fingerprint: str | None = None
    tokens_seen: int | None = None
    heldout_loss: float | None = None
    bits_per_byte: float | None = None
    best_step: int | None = None
    recipe: str | None = None
    scores: CheckpointScores | None = None
    versions: dict[str, str] = {}


class Fidelity(_Frozen):
    """Logits of what was read back beside those of the trained model, over `num_tokens` fixed tokens.

    `largest_difference` is absolute; `logit_range` is the trained model's largest logit less its smallest.
    `same_top_share` is the share of positions whose likeliest token is the same.
    """

    largest_difference: float
    logit_range: float
    same_top_share: float
    num_tokens: int

    @property
    def share(self) -> float:
        """The largest difference as a share of the range of the logits."""
        return self.largest_difference / self.logit_range if self.logit_range else 0.0


class Export(_Frozen):
    """What was written, and how near it is to what was trained. `notes` is what to know before it is used."""

    format: ExportFormat
    dtype: ExportDtype
    folder: str
    checkpoint: str | None
    num_bytes: int
    files: tuple[str, ...]
    fidelity: Fidelity
    notes: tuple[str, ...] = ()
