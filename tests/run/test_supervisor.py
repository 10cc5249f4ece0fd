"""A worker that dies is started again, as often as it gets somewhere; one that ends is left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onecard.run import supervisor as module
from onecard.run.supervisor import Note, Supervisor, is_supervised, read_note

# A stand-in for `onecard`: each line of its script says how one worker ends, after the checkpoints it writes.
WORKER = """
import json, os, pathlib, signal, sys, time
root = pathlib.Path(sys.argv[1])
(root / "calls").open("a").write(json.dumps(sys.argv[2:]) + "\\n")
number = len((root / "calls").read_text().splitlines()) - 1
how, step, *rest = json.loads((root / "script").read_text())[number]
note = {"run": str(root), "max_restarts": 2, "has_begun": True, "has_ended": False}
path = pathlib.Path(os.environ["ONECARD_SUPERVISOR_NOTE"])
path.write_text(json.dumps(note | dict(*rest)))
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
    assert run(tmp_path, [[code, 0]], ["train", "demo"], capsys) == (code, [["train", "demo"]], "")


def test_an_error_that_python_told_is_no_death(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, [["ends", 0]], ["train", "demo"], capsys)[:2] == (1, [["train", "demo"]])


@pytest.mark.parametrize("death", [-9, -11, 5, 1, 255], ids=["killed", "crashed", "GPU lost", "ended", "other"])
def test_a_worker_that_died_is_started_again(death: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, calls, told = run(tmp_path, [[death, 7], [0, 9]], ["train", "demo", "--json"], capsys)
    assert (code, calls) == (0, [["train", "demo", "--json"], ["resume", str(tmp_path), "--json"]])
    assert "goes on from step 7 (restart 1 of 2 without a new checkpoint)" in told


def test_deaths_count_until_there_is_a_new_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, calls, told = run(tmp_path, [[-9, 0], [-9, 5], [-9, 0], [-9, 8], [0, 0]], ["train", "demo"], capsys)
    assert (code, len(calls)) == (0, 5)
    assert "the beginning, for there is no checkpoint yet" in told


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


def test_a_real_command_is_brought_to_its_end(tmp_path: Path, corpus_text: Path) -> None:
    """Its worker is killed after the first checkpoint."""
    run_folder = tmp_path / "run"
    words = ["train", "--dataset", str(corpus_text), "--tokenizer", "bytes", "--max_seq_length", "16"]
    words += ["--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--max_steps", "60"]
    words += ["--model_config", '{"model_type": "llama", "intermediate_size": 32}', "--save_steps", "10"]
    words += ["--total_batch_size", "4", "--precision", "fp32", "--device", "cpu", "--report_to", "none"]
    environment = os.environ | {"ONECARD_CACHE": str(tmp_path / "cache"), "ONECARD_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "onecard", *words, "--output_dir", str(run_folder)]
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
    steps = [json.loads(line) for line in (run_folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["step"] for event in steps if event["event"] == "step"] == list(range(1, 61))
