"""What an evaluation is made of: a model with its name, a task, and what the task found."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.evaluation.paired import Items
from onecard.evaluation.work import Perform, Report, Work
from onecard.spec import Score
from onecard.spec.score import Protocol as ScoreProtocol


@dataclass(frozen=True)
class Subject:
    """A loaded model; `protocol` tells its weights, precision and device, and the versions that ran it.

    `shared` does what a task asks of the model where other processes take part.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    protocol: ScoreProtocol
    shared: Perform | None = None

    def perform(self, work: Work, report: Report) -> list[Any]:
        """Does what a task asks of the model; gives what is found of each item."""
        return self.shared(work, report) if self.shared else work.do(self.model, self.tokenizer, report)


@dataclass(frozen=True)
class Result:
    """Scores of one model; `items` is what the score that ranks was made of; `rows` are texts worth keeping."""

    scores: tuple[Score, ...]
    items: Items
    notes: tuple[str, ...] = ()
    rows: tuple[dict[str, object], ...] = field(default=())


class Task(Protocol):
    """Measures one model after the other over the same items; `ranks_by` names the score that says which is best."""

    name: str
    ranks_by: str
    is_lower_better: bool
    # How many items there are, and a hash of them and of what is done with them; both of those that are measured.
    num_items: int
    fingerprint: str

    def measure(self, subject: Subject) -> Result:
        """Measures one model."""
        ...
