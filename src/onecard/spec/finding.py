"""What onecard noticed, and what to do about it."""

from pydantic import BaseModel, ConfigDict


class Finding(BaseModel):
    """A symptom with its evidence, likely cause and remedy (a concrete setting); `stops_run` ends the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    symptom: str
    evidence: str
    likely_cause: str
    remedy: str
    stops_run: bool = False
