"""Curves for TensorBoard, written by TensorBoard's own writer: no torch."""

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event as ProtoEvent
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from onecard.observe.events import EvaluatedEvent, Event, Sample, SampledEvent, StepEvent


class TensorBoardSink:
    """Writes scalars per step and evaluation, and samples as text.

    A resumed run writes a file of its own that starts with a mark at the step after `resumed_at`: TensorBoard then
    drops what earlier files hold from that step on, so that no point is drawn twice.
    """

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        # The queue absorbs a slow disk; 10 s is how late a watcher sees a point.
        self._writer = EventFileWriter(str(folder), max_queue_size=1000, flush_secs=10)
        if resumed_at is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(ProtoEvent(wall_time=time.time(), step=resumed_at + 1, session_log=start))

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
            case SampledEvent():
                self._add(event.step, text_pb("samples", [_as_markdown(sample) for sample in event.samples]))

    def close(self) -> None:
        self._writer.close()

    def _add_scalars(self, step: int, scalars: dict[str, float | None]) -> None:
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items() if x is not None]
        self._add(step, Summary(value=values))

    def _add(self, step: int, summary: Summary) -> None:
        self._writer.add_event(ProtoEvent(wall_time=time.time(), step=step, summary=summary))


def _as_markdown(sample: Sample) -> str:
    """TensorBoard reads text as Markdown: indented, it keeps its lines and symbols."""
    return "\n".join(f"    {line}" for line in (sample.prompt + sample.completion).split("\n"))
