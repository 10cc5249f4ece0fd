"""A worker that dies is started again, as often as it gets somewhere; one that ends is left alone."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from onecard.cli import main
from onecard.run import supervisor as module
from onecard.run.control import Control, stopping_on_signals
from onecard.run.supervisor import Note, Supervisor, is_supervised, read_note

# A stand-in for `onecard`: each line of its script says how one worker ends, after the checkpoints it writes.
WORKER = """
import json, os, pathlib, shutil, signal, sys, time
root = pathlib.Path(sys.argv[1])
(root / "calls").open("a").write(json.dumps(sys.argv[2:]) + "\\n")
number = len((root / "calls").read_text().splitlines()) - 1
how, step, *rest = json.loads((root / "script").read_text())[number]
note = {"run": str(root), "max_restarts": 2, "has_begun": True, "has_ended": False}
path = pathlib.Path(os.environ["ONECARD_SUPERVISOR_NOTE"])
path.write_text(json.dumps(note | dict(*rest)))
if step < 0:  # went back, and came to there
    shutil.rmtree(root / "checkpoints")
    step = -step
if step:
    (root / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (root / "checkpoints" / f"step-{step:06d}" / "manifest.json").write_text("{}")
if isinstance(how, int) and how < 0:
    os.kill(os.getpid(), -how)
if how == "waits":
    print("waiting", flush=True)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.stdin.read()
    (root / "alone").touch()
    os._exit(0)
if how == "trains":
    time.sleep(5)
    os._exit(0)
if how == "ends":
    path.write_text(json.dumps(note | {"has_ended": True}))
    how = 1
os._exit(how)
"""


def run(tmp_path: Path, script: list[list[object]], words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple:
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    (tmp_path / "script").write_text(json.dumps(script), encoding="utf-8")
    command = (sys.executable, "-S", str(tmp_path / "worker.py"), str(tmp_path))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = Supervisor(tmp_path / "note.json", command, pause_s=0.0).run(words)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text(encoding="utf-8").splitlines()]
    return code, calls, capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 2, 3, 4, 130])
def test_ends_that_a_worker_chooses_pass_through(code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, [[code, 0, {"has_ended": True}]], ["train", "demo"], capsys) == (code, [["train", "demo"]], "")


def test_an_error_that_python_told_is_no_death(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, [["ends", 0]], ["train", "demo"], capsys)[:2] == (1, [["train", "demo"]])


@pytest.mark.parametrize(
    "death", [-9, -11, 5, 1, 3, 255], ids=["killed", "crashed", "GPU lost", "ended", "abort() on Windows", "other"]
)
def test_a_worker_that_died_is_started_again(death: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, calls, told = run(tmp_path, [[death, 7], [0, 9]], ["train", "demo", "--json"], capsys)
    assert (code, calls) == (0, [["train", "demo", "--json"], ["resume", str(tmp_path), "--json"]])
    assert "goes on from step 7 (restart 1 of 2 without a new checkpoint)" in told


def test_deaths_count_until_there_is_a_new_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, calls, told = run(tmp_path, [[-9, 0], [-9, 5], [-9, 0], [-9, 8], [0, 0]], ["train", "demo"], capsys)
    assert (code, len(calls)) == (0, 5)
    assert "the beginning, for there is no checkpoint yet" in told


def test_a_run_that_went_back_gets_on_from_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = [[-9, 30], [-9, -10], [-9, 20], [-9, 0], [0, 0]]
    assert run(tmp_path, script, ["train", "demo"], capsys)[0] == 0


GONE = [2, 0, {"run": None, "has_ended": True}]


@pytest.mark.parametrize("num_missing", [0, 1, 2])
def test_a_lost_gpu_is_waited_for(
    num_missing: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(Supervisor, "_pause", lambda _, num_times: pauses.append(num_times))
    script = [[5, 7], *[GONE] * num_missing, [0, 0]]
    code, calls, told = run(tmp_path, script, ["train", "demo"], capsys)
    if num_missing == 2:  # of as many restarts
        assert (code, pauses) == (5, [1, 2])
        assert "exit code 2: the GPU was lost before, and may not be back yet" in told
    else:
        assert (code, pauses) == (0, [1, 2][: num_missing + 1])
        assert calls[1:] == [["resume", str(tmp_path)]] * (num_missing + 1)


@pytest.mark.parametrize("how", [2, -7, 0xC0000006], ids=["read error", "mapped file", "mapped file on Windows"])
def test_a_lost_share_is_waited_for(
    how: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(Supervisor, "_pause", lambda _, num_times: pauses.append(num_times))
    first = [77, 7, {"has_lost_disk": how == 2, "has_ended": True}]
    wait = Supervisor._run_worker
    monkeypatch.setattr(Supervisor, "_run_worker", lambda *args: how if (code := wait(*args)) == 77 else code)
    code, calls, told = run(tmp_path, [first, GONE, [0, 0]], ["train", "demo"], capsys)
    assert (code, pauses, calls[1:]) == (0, [1, 2], [["resume", str(tmp_path)]] * 2)
    assert "Waiting 0 s for the disk or network share; then it is started again and goes on from step 7" in told
    assert "exit code 2: the disk or network share was lost before, and may not be back yet" in told


def test_a_share_that_stays_away_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = {"has_lost_disk": True, "has_ended": True}
    script = [[2, 7, lost], [2, 0, lost], [2, 0, lost], [0, 0]]
    code, calls, told = run(tmp_path, script, ["train", "demo"], capsys)
    assert (code, len(calls)) == (1, 3)
    assert "the last time by exit code 2: the disk or network share did not answer" in told


def test_a_share_that_comes_and_goes_is_no_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints are not new when they are seen again."""
    seen = iter([7, None, 7, None, 7])
    monkeypatch.setattr(module, "newest_step", lambda _: next(seen))
    lost = {"has_lost_disk": True, "has_ended": True}
    code, calls, told = run(tmp_path, [[2, 0, lost]] * 5, ["train", "demo"], capsys)
    assert (code, len(calls)) == (1, 3)
    assert "goes on from the last checkpoint (restart 2 of 2" in told


def test_a_share_that_is_lost_before_the_run_began_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"run": None, "has_lost_disk": True, "has_ended": True}
    assert run(tmp_path, [[2, 0, lost]], ["train", "demo"], capsys) == (2, [["train", "demo"]], "")


def test_where_the_run_folder_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.newest_step(str(tmp_path)) == -1
    assert module.newest_step(str(tmp_path / "away")) is None

    def stale(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "glob", stale)
    assert module.newest_step(str(tmp_path)) is None


def test_a_worker_that_gets_nowhere_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, calls, told = run(tmp_path, [[-9, 3], [-11, 0], [-11, 0], [0, 0]], ["train", "demo"], capsys)
    assert (code, len(calls)) == (1, 3)
    assert "died 3 times without a new checkpoint in between, the last time by signal 11" in told
    assert f"onecard resume {tmp_path}" in told


def test_a_worker_that_died_before_its_run_began_is_not_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, calls, told = run(tmp_path, [[-9, 0, {"run": None}]], ["train", "demo"], capsys)
    assert (code, len(calls)) == (1, 1)
    assert "before the run began" in told


def test_a_second_worker_that_died_while_it_loaded_is_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [[-9, 3], [-9, 0, {"run": None}], [0, 0]]
    code, calls, _ = run(tmp_path, script, ["train", "demo"], capsys)
    assert (code, calls[1:]) == (0, [["resume", str(tmp_path)]] * 2)


def test_a_named_checkpoint_is_named_again_until_the_run_has_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["resume", "runs/a/checkpoints/step-000003", "--accept", "data"]
    script = [[-9, 0, {"has_begun": False}], [-9, 5], [0, 0]]
    _, calls, _ = run(tmp_path, script, words, capsys)
    assert calls == [words, words, ["resume", str(tmp_path), "--accept=data"]]


def test_so_is_one_that_train_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--resume", "runs/a/checkpoints/step-000003"]
    _, calls, _ = run(tmp_path, [[-9, 0, {"has_begun": False}], [-9, 5], [0, 0]], words, capsys)
    assert calls == [words, words, ["resume", str(tmp_path)]]


def test_a_run_that_began_is_not_begun_a_second_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = [[-9, 3], [-9, 0, {"has_begun": False}], [0, 0]]
    _, calls, _ = run(tmp_path, script, ["train", "demo"], capsys)
    assert calls == [["train", "demo"], ["resume", str(tmp_path)], ["resume", str(tmp_path)]]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_worker_that_is_being_started_is_stopped_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen

    def start_slowly(*args: Any, **keywords: Any) -> "subprocess.Popen[bytes]":
        process = start(*args, **keywords)
        signal.raise_signal(signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_slowly)
    (tmp_path / "calls").touch()
    assert run(tmp_path, [["trains", 0]], ["train"], capsys)[0] == 130


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_what_nohup_ignores_stays_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path, [[0, 0]], ["train"], capsys)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        control = Control()
        with stopping_on_signals(control):
            signal.raise_signal(signal.SIGHUP)
            assert not control.stop
            signal.raise_signal(signal.SIGTERM)
            assert control.stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_interrupt_after_another_reason_to_stop_is_no_second_one() -> None:
    control = Control(stop=True)
    with stopping_on_signals(control):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


IN_BACKGROUND = """
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
from onecard.run.lifeline import Lifeline
Lifeline.take_up()
time.sleep(30)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_background_job_learns_that_its_supervisor_is_gone(tmp_path: Path) -> None:
    environment = os.environ | {module.NOTE_VARIABLE: str(tmp_path / "note")}
    command = [sys.executable, "-c", IN_BACKGROUND]
    ended = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, timeout=30, check=False)
    assert ended.returncode == 7


def test_without_a_place_for_notes_the_command_runs_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    monkeypatch.setattr(sys, "argv", ["onecard", "resume", "nothing"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "a run that dies is not started again by itself" in told
    assert "nothing is no run folder" in told.replace("\n", " ")


def test_which_commands_have_a_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_supervised(["train", "demo"])
    assert is_supervised(["resume", "latest"])
    assert is_supervised(["train", "demo", "--max_restarts", "10"])
    for words in (
        [],
        ["plan", "demo"],
        ["train", "--help"],
        ["resume", "latest", "--verify", "3"],
        ["resume", "latest", "--verify=3"],
        ["train", "demo", "--max_restarts", "0"],
        ["train", "demo", "--max-restarts=0"],
    ):
        assert not is_supervised(words), words
    monkeypatch.setenv(module.NOTE_VARIABLE, "note")
    assert not is_supervised(["train", "demo"])


def test_a_note_that_is_none(tmp_path: Path) -> None:
    for content in (None, "", "[]", '{"odd": 1}'):
        if content is not None:
            (tmp_path / "note").write_text(content, encoding="utf-8")
        assert read_note(tmp_path / "note") == Note()


def test_the_supervisor_imports_nothing_heavy() -> None:
    program = (
        "import sys, onecard.cli; print(*(name for name in ('torch', 'typer', 'rich', 'yaml') if name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


PROGRAM = """
import sys
from pathlib import Path
from onecard.run.supervisor import Supervisor
root = Path(sys.argv[1])
sys.exit(Supervisor(root / "note.json", (sys.executable, "-S", str(root / "worker.py"), str(root))).run(["train"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl+C", "killed"])
def test_what_becomes_of_the_worker_when_the_supervisor_is_stopped(number: int, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    (tmp_path / "script").write_text('[["waits", 0]]', encoding="utf-8")
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGINT else -9)
        process.stdout.read()  # until the worker has ended, too
    assert (tmp_path / "alone").exists() == (number == signal.SIGKILL)
    assert len((tmp_path / "calls").read_text(encoding="utf-8").splitlines()) == 1


def command_of(run_folder: Path, text: Path, *flags: str) -> list[str]:
    words = ["train", "--dataset", str(text), "--tokenizer", "bytes", "--max_seq_length", "16", *flags]
    words += ["--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--max_steps", "60"]
    words += ["--model_config", '{"model_type": "llama", "intermediate_size": 32}', "--save_steps", "10"]
    words += ["--total_batch_size", "4", "--precision", "fp32", "--device", "cpu", "--report_to", "none"]
    return [sys.executable, "-m", "onecard", *words, "--output_dir", str(run_folder)]


def steps_of(run_folder: Path) -> list[int]:
    events = [json.loads(line) for line in (run_folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event["step"] for event in events if event["event"] == "step"]


def test_a_real_command_is_brought_to_its_end(tmp_path: Path, corpus_text: Path) -> None:
    """Its worker is killed after the first checkpoint."""
    run_folder = tmp_path / "run"
    environment = os.environ | {"ONECARD_CACHE": str(tmp_path / "cache"), "ONECARD_HOME": str(tmp_path / "home")}
    command = command_of(run_folder, corpus_text)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        import psutil

        while not list(run_folder.glob("checkpoints/step-*/manifest.json")):
            assert process.poll() is None
            time.sleep(0.002)
        for worker in psutil.Process(process.pid).children():
            worker.kill()
        out, errors = (stream.decode() for stream in process.communicate(timeout=120))
    assert process.returncode == 0, errors
    assert "signal 9" in errors
    assert "completed: 60 steps" in out
    assert steps_of(run_folder) == list(range(1, 61))


LOSING = """
import atexit, errno, sys
from pathlib import Path
from onecard.cli import main
root, words = Path(sys.argv[1]), sys.argv[2:]
run, away, number = root / "run", root / "away", len(list(root.glob("start-*")))
(root / f"start-{number}").touch()
if number == 0:
    from onecard.run import feed
    read = feed.Feed.__next__
    def lost(self):
        if list(run.glob("checkpoints/step-*/manifest.json")):
            raise OSError(errno.EIO, "Input/output error", "text.txt")
        return read(self)
    feed.Feed.__next__ = lost
if number == 1:
    run.rename(away)
    atexit.register(away.rename, run)
main(words)
"""


def test_a_real_run_goes_on_when_its_share_is_back(
    tmp_path: Path, corpus_text: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read fails after the first checkpoint, and the next worker finds no run folder."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "home"))
    (tmp_path / "losing.py").write_text(LOSING, encoding="utf-8")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    command = (sys.executable, str(tmp_path / "losing.py"), str(tmp_path))
    try:
        code = Supervisor(tmp_path / "note", command, 0.0).run(command_of(tmp_path / "run", corpus_text)[3:])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    told = capfd.readouterr().err
    assert code == 0, told
    assert "text.txt: Input/output error" in told
    assert "exit code 2: the disk or network share did not answer" in told
    assert "exit code 2: the disk or network share was lost before, and may not be back yet" in told
    assert "Traceback" not in told
    assert steps_of(tmp_path / "run") == list(range(1, 61))


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize("last", [b"", b"step 1/", b"run folder"])
def test_a_run_whose_reader_is_gone_goes_on(last: bytes, tmp_path: Path, corpus_text: Path) -> None:
    run_folder = tmp_path / "run"
    environment = os.environ | {"ONECARD_CACHE": str(tmp_path / "cache"), "ONECARD_HOME": str(tmp_path / "home")}
    command = command_of(run_folder, corpus_text, "--max_restarts", "0", "--logging_steps", "1")
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while last and not (line := process.stdout.readline()).startswith(last):
            assert line
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(120) == 0, errors
    assert "Traceback" not in errors
    assert steps_of(run_folder) == list(range(1, 61))
