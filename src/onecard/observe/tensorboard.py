"""Curves for TensorBoard, in its own format: no torch."""

import itertools
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event as ProtoEvent
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from onecard.observe.events import (
    EvaluatedEvent,
    Event,
    RecoveredEvent,
    Sample,
    SampledEvent,
    ScoredEvent,
    StepEvent,
    named_scores,
)

_numbers = itertools.count()


class TensorBoardSink:
    """Writes scalars per step and evaluation, and samples as text.

    A resumed run writes a file of its own that starts with a mark at the step after `resumed_at`: TensorBoard then
    drops what came before from that step on, so that no point is drawn twice; so does a run that goes back. A full
    disk is an OSError of the call that met it: TensorBoard's EventFileWriter meets it in a thread, which prints a
    traceback.
    """

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, and only those with this beginning.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        with ExitStack() as unless_whole:
            file = unless_whole.enter_context((folder / name).open("wb"))
            self._writer = RecordWriter(file)
            self._write(ProtoEvent(wall_time=time.time(), file_version="brain.Event:2"))
            if resumed_at is not None:
                self._drop_after(resumed_at)
            unless_whole.pop_all()

    def receive(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._add_scalars(
                    event.step,
                    {
                        "train/loss": event.loss,
                        "train/learning_rate": event.learning_rate,
                        "train/grad_norm": event.grad_norm,
                        "speed/tokens_per_s": event.tokens_per_s,
                        "speed/share_of_peak": event.share_of_peak,
                    },
                )
            case EvaluatedEvent():
                self._add_scalars(event.step, {"eval/loss": event.loss, "eval/bits_per_byte": event.bits_per_byte})
            case ScoredEvent():
                self._add_scalars(event.step, dict(named_scores(event)))
            case SampledEvent():
                self._add(event.step, text_pb("samples", [_as_markdown(sample) for sample in event.samples]))
            case RecoveredEvent() if event.returned_from is not None:
                self._drop_after(event.step)

    def close(self) -> None:
        self._writer.close()

    def _drop_after(self, step: int) -> None:
        start = SessionLog(status=SessionLog.START)
        self._write(ProtoEvent(wall_time=time.time(), step=step + 1, session_log=start))

    def _add_scalars(self, step: int, scalars: dict[str, float | None]) -> None:
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items() if x is not None]
        self._add(step, Summary(value=values))

    def _add(self, step: int, summary: Summary) -> None:
        self._write(ProtoEvent(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: ProtoEvent) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def _as_markdown(sample: Sample) -> str:
    """TensorBoard reads text as Markdown: indented, it keeps its lines and symbols."""
    return "\n".join(f"    {line}" for line in (sample.prompt + sample.completion).split("\n"))
