"""Who hears about events."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from onecard.errors import InputError
from onecard.observe.events import Event


class Sink(Protocol):
    """Takes events in the order in which they happen; `close` is called once, also after an error."""

    def receive(self, event: Event) -> None: ...

    def close(self) -> None: ...


def check_targets(report_to: Sequence[Literal["tensorboard", "wandb"]]) -> None:
    """Refuses a sink whose package is missing, before any work is done.

    Raises:
        InputError: wandb is asked for and not installed.
    """
    if "wandb" in report_to and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "report_to asks for wandb, which is not installed: pip install wandb, or set report_to: [tensorboard]"
        )


def make_sinks(
    report_to: Sequence[Literal["tensorboard", "wandb"]],
    run_folder: Path,
    *,
    run_name: str | None = None,
    config: dict[str, Any] | None = None,
    resumed_at: int | None = None,
) -> list[Sink]:
    """Makes the sinks that a recipe's `report_to` asks for; the record and the console are made by their owners.

    `resumed_at` is the step of the checkpoint that a run continues from; `config` is what W&B shows beside the curves.
    Raises `InputError` where wandb cannot start.
    """
    check_targets(report_to)
    sinks: list[Sink] = []
    if "tensorboard" in report_to:
        # Imported here, for it takes longer than all of `onecard --help`.
        from onecard.observe.tensorboard import TensorBoardSink

        sinks.append(TensorBoardSink(run_folder / "tensorboard", resumed_at=resumed_at))
    if "wandb" in report_to:
        from onecard.observe.wandb import WandbSink

        sinks.append(WandbSink(run_folder, name=run_name or run_folder.name, config=config))
    return sinks
