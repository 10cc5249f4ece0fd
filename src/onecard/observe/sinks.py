"""Who hears about events."""

import contextlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from onecard.errors import InputError
from onecard.observe.events import Event

log = logging.getLogger("onecard.observe")


class Sink(Protocol):
    """Takes events in the order in which they happen; `close` is called once, also after an error."""

    def receive(self, event: Event) -> None: ...

    def close(self) -> None: ...


class SinkThatMayFail:
    """A sink whose disk may be full: from the first failure on it hears nothing more, and the run goes on."""

    def __init__(self, sink: Sink) -> None:
        self._sink: Sink | None = sink

    def receive(self, event: Event) -> None:
        if self._sink is None:
            return
        try:
            self._sink.receive(event)
        except OSError as error:
            log.warning("%s is not written to any more: %s. Everything is in events.jsonl", _name_of(self._sink), error)
            self.close()

    def close(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            with contextlib.suppress(OSError):
                sink.close()


def _name_of(sink: Sink) -> str:
    return type(sink).__name__.removesuffix("Sink")


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
