"""The result of an evaluation."""

from pydantic import BaseModel, ConfigDict

Protocol = dict[str, str | int | float | bool | None]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Frozen):
    """A named value with its standard error over `n` items, and the protocol that makes it comparable."""

    name: str
    value: float
    standard_error: float | None
    n: int
    protocol: Protocol


class CheckpointScores(_Frozen):
    """What one model reached: `name` is its checkpoint (step-000100), its folder, or a file of responses."""

    name: str
    step: int | None
    scores: tuple[Score, ...]

    def find(self, name: str) -> Score:
        """The score of that name."""
        return next(score for score in self.scores if score.name == name)


class Comparison(_Frozen):
    """The best checkpoint beside another one, over the same `n` items (held-out blocks, prompts).

    `gain` is how much better the best is, in the unit of `score`, above zero whichever way is better. `p_value` is
    two-sided, of `test`, for this pair alone; `corrected_p_value` allows for the number of pairs that were looked at.
    """

    score: str
    best: str
    other: str
    gain: float
    standard_error: float
    p_value: float
    corrected_p_value: float
    num_comparisons: int
    test: str
    n: int


class Evaluation(_Frozen):
    """Scores of one or several checkpoints; `best` names the best by each score that ranks, `notes` is what to know."""

    checkpoints: tuple[CheckpointScores, ...]
    best: dict[str, str]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()
