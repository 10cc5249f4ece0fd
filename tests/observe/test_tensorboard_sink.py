import errno
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from onecard.observe import make_sinks
from onecard.observe.tensorboard import TensorBoardSink


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path: Path, step_event, evaluated, scored) -> None:
    (sink,) = make_sinks(["tensorboard"], tmp_path)
    for step in (1, 2, 3):
        sink.receive(step_event(step, loss=4.0 - step))
    sink.receive(evaluated)
    sink.receive(scored)
    sink.close()
    curves = scalars(tmp_path / "tensorboard")
    assert curves["train/loss"] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert curves["train/learning_rate"][0][1] == pytest.approx(3e-3)
    assert curves["speed/tokens_per_s"] == [(1, 2000.0), (2, 2000.0), (3, 2000.0)]
    assert curves["eval/loss"] == [(20, 1.75)]
    assert curves["eval/bits_per_byte"] == [(20, 1.25)]
    assert (curves["ifeval/strict"], curves["ifeval/loose"]) == ([(20, 0.25)], [(20, 0.375)])
    assert "speed/share_of_peak" not in curves  # unknown for this device


def test_a_resumed_run_draws_no_point_twice(tmp_path: Path, step_event, monkeypatch) -> None:
    first = TensorBoardSink(tmp_path)
    for step in range(1, 6):
        first.receive(step_event(step, loss=1.0))
    first.close()
    # The names of event files order them by second; a real resume never comes within one.
    later = time.time() + 2
    monkeypatch.setattr("time.time", lambda: later)
    second = TensorBoardSink(tmp_path, resumed_at=3)
    for step in range(4, 7):
        second.receive(step_event(step, loss=2.0))
    second.close()
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_a_run_that_went_back_draws_no_point_twice(tmp_path: Path, step_event, recovered) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 6):
        sink.receive(step_event(step, loss=1.0))
    sink.receive(recovered)  # stays where it is
    sink.receive(replace(recovered, step=3, returned_from=5, position=40))
    for step in range(4, 7):
        sink.receive(step_event(step, loss=2.0))
    sink.close()
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_a_file_torn_by_a_kill_is_read_up_to_the_tear(tmp_path: Path, step_event) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        sink.receive(step_event(step))
    sink.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2]


def test_a_full_disk_is_an_error_of_the_caller(tmp_path: Path, step_event, monkeypatch, capfd) -> None:
    sink = TensorBoardSink(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", refuse)
    for use in (lambda: sink.receive(step_event(1)), lambda: TensorBoardSink(tmp_path)):
        with pytest.raises(OSError, match="No space left"):
            use()
    sink.close()
    assert capfd.readouterr().err == ""


def test_samples_arrive_as_text(tmp_path: Path, sampled) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    sink = TensorBoardSink(tmp_path)
    sink.receive(sampled)
    sink.close()
    (point,) = EventAccumulator(str(tmp_path)).Reload().Tensors("samples")
    texts = [text.decode("utf-8") for text in make_ndarray(point.tensor_proto)]
    assert texts == ["    def [bold]add(a, b):\n        return a  # [/bold]", "    你好，世界"]


def test_watching_needs_no_torch() -> None:
    code = (
        "import sys, onecard.observe, onecard.observe.tensorboard; "
        "sys.exit([name for name in ('torch', 'tensorflow') if name in sys.modules] or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
