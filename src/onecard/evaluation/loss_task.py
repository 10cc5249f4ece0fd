"""The loss on a run's own held-out text or chats, as a task."""

import math

from onecard.data import TrainingData
from onecard.evaluation.heldout import measure_blocks, summarize
from onecard.evaluation.task import Result, Subject
from onecard.model.attention import attention_of
from onecard.model.families import implementation_of
from onecard.model.loss import find_head
from onecard.spec import Plan, Score

# What a protocol calls it.
HELDOUT = "held-out loss"


class LossTask:
    """Loss, perplexity and bits per byte over every held-out target token, or over `limit` blocks spread evenly."""

    name = "loss"
    ranks_by = "loss"
    is_lower_better = True

    def __init__(self, corpus: TrainingData, plan: Plan, *, batch_size: int, backend: str, limit: int | None) -> None:
        self._corpus = corpus
        self._plan = plan
        self._batch_size = batch_size
        self._backend = backend
        self._limit = limit
        self.num_items = plan.corpus.num_heldout_tokens
        self.fingerprint = corpus.fingerprint[:16]

    def measure(self, subject: Subject) -> Result:
        """Measures one model."""
        batches = self._corpus.heldout_batches(self._plan.max_seq_length, self._batch_size, self._limit)
        with attention_of(subject.model, implementation_of(subject.model.config, self._backend)):
            blocks = measure_blocks(subject.model, find_head(subject.model), batches, self._backend)
        found, facts = summarize(blocks), self._plan.corpus
        perplexity = math.exp(min(found.loss, 700.0))  # beyond, a float ends
        num_tokens = facts.num_heldout_target_tokens or facts.num_heldout_tokens
        bits, bits_error = (
            loss / math.log(2) * num_tokens / facts.heldout_bytes for loss in (found.loss, found.standard_error)
        )
        protocol = subject.protocol | {
            "task": HELDOUT,
            "data": self.fingerprint,
            "max_seq_length": self._plan.max_seq_length,
            "attention": self._backend,
            "limit": self._limit,
        }
        values = {
            "loss": (found.loss, found.standard_error),
            "perplexity": (perplexity, perplexity * found.standard_error),
            "bits_per_byte": (bits, bits_error),
        }
        scores = tuple(
            Score(name=name, value=value, standard_error=error, n=found.num_target_tokens, protocol=protocol)
            for name, (value, error) in values.items()
        )
        return Result(scores, blocks)
