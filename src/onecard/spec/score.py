"""The result of an evaluation."""

from pydantic import BaseModel, ConfigDict


class Score(BaseModel):
    """A named value with its standard error over `n` items, and the protocol that makes it comparable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    value: float
    standard_error: float | None
    n: int
    protocol: dict[str, str | int | float | bool | None]
