"""Curves for Weights & Biases."""

import secrets
from pathlib import Path
from typing import Any

from onecard.errors import InputError
from onecard.observe.events import (
    EvaluatedEvent,
    Event,
    FinishedEvent,
    SampledEvent,
    ScoredEvent,
    StepEvent,
    named_scores,
)

_ID_FILE = "wandb_id.txt"


class WandbSink:
    """Logs scalars and samples to one W&B run, the same after a resume (its id lies in the run folder).

    Curves are drawn over a `step` of their own: W&B drops points whose built-in step goes back, as it does when a
    resumed run repeats what a killed one had done; those steps hold two points, equal where the run is deterministic.
    Raises `InputError` where wandb cannot start (`WANDB_MODE=offline` needs no account).
    """

    def __init__(self, folder: Path, *, name: str, project: str = "onecard", config: dict[str, Any] | None = None):
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=_stored_id(folder),
                resume="allow",
                dir=str(folder),
                config=config,
                # Output is recorded in events.jsonl; wandb's capture would break the progress bar.
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise InputError(
                f"W&B cannot start: {error}; run `wandb login`, or set WANDB_MODE=offline, "
                "or set report_to: [tensorboard]"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def receive(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._log(
                    event.step,
                    {
                        "train/loss": event.loss,
                        "train/learning_rate": event.learning_rate,
                        "train/grad_norm": event.grad_norm,
                        "train/tokens_seen": event.tokens_seen,
                        "speed/tokens_per_s": event.tokens_per_s,
                        "speed/share_of_peak": event.share_of_peak,
                    },
                )
            case EvaluatedEvent():
                self._log(event.step, {"eval/loss": event.loss, "eval/bits_per_byte": event.bits_per_byte})
            case ScoredEvent():
                self._log(event.step, dict(named_scores(event)))
            case SampledEvent():
                rows = [[sample.prompt, sample.completion] for sample in event.samples]
                self._log(event.step, {"samples": self._wandb.Table(columns=["prompt", "completion"], data=rows)})
            case FinishedEvent():
                self._run.summary.update({"best_loss": event.best_loss, "best_step": event.best_step})

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **{name: value for name, value in values.items() if value is not None}})


def _stored_id(folder: Path) -> str:
    path = folder / _ID_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
