"""What onecard noticed, and what to do about it."""

from pydantic import BaseModel, ConfigDict


class Finding(BaseModel):
    """A symptom with its evidence, likely cause and remedy (a concrete setting); `stops_run` ends the run.

    `id` names it in the catalogue of findings, whose pages say more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    symptom: str
    evidence: str
    likely_cause: str
    remedy: str
    stops_run: bool = False
    id: str = ""
