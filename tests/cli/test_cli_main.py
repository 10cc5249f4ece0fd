import errno
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onecard.errors import DivergedError, DoesNotFitError, InputError

HEAVY = ("torch", "transformers", "datasets", "tensorboard", "numpy", "pydantic", "yaml", "onecard.api")


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from onecard.cli import main\n"
        "try: main(['--help'])\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    seconds = time.perf_counter() - started
    assert done.stderr.strip() == "[]"
    assert "train" in done.stdout
    assert seconds < 5.0  # 0.15 s on an idle machine; the modules above are the real guard


@pytest.mark.parametrize("verb", ["train", "plan", "prepare", "resume", "replay", "generate", "recipes", "cards"])
def test_every_verb_has_help(run, verb: str) -> None:
    done = run(verb, "--help")
    assert (done.code, done.stderr) == (0, "")
    assert f"onecard {verb}" in done.stdout


def test_the_version_is_that_of_the_package(run) -> None:
    assert run("--version").stdout.startswith("onecard 0.")


def test_a_misspelt_verb_gets_a_suggestion(run) -> None:
    done = run("trian")
    assert done.code == 2
    assert "'train'" in done.stderr


@pytest.mark.parametrize(("error", "code"), [(InputError, 2), (DoesNotFitError, 3), (DivergedError, 4)])
def test_our_errors_are_a_message_and_an_exit_code(run, api, error, code: int) -> None:
    api.raises = error("what, why, [what to do]")
    done = run("train", "--dataset", "a.txt")
    assert done.code == code
    assert done.stderr == "what, why, [what to do]\n"


def test_a_defect_asks_for_a_report_and_shows_its_traceback(api, capsys: pytest.CaptureFixture[str]) -> None:
    from onecard.cli import main

    api.raises = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        main(["train", "--dataset", "a.txt"])
    assert "Please report it" in capsys.readouterr().err


def test_a_reader_who_leaves_early_is_no_error() -> None:
    code = "from onecard.cli import main; main(['recipes', '--keys'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


def run_with(redirection: str, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = f"{shlex.join([sys.executable, '-m', 'onecard', *words])} {redirection}"
    return subprocess.run(["sh", "-c", line], capture_output=True, env={**os.environ, **environment})


@pytest.mark.skipif(sys.platform == "win32", reason="redirections of a POSIX shell")
def test_output_that_leads_nowhere() -> None:
    closed = run_with(">&-", "recipes")
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, b"", b"")
    assert run_with("2>&-", "recipes").returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--keys"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_named(words: list[str], unbuffered: str) -> None:
    full = run_with(">/dev/full", *words, PYTHONUNBUFFERED=unbuffered)
    assert full.returncode == 2
    assert full.stderr.startswith(b"stdout cannot be written to: No space left on device")
    assert full.stderr.count(b"\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="asks for a locale by the environment")
def test_redirected_output_is_utf8_whatever_the_locale() -> None:
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    assert "从前" in run_with("", "recipes", "rtx-5060-pretrain", **plain).stdout.decode("utf-8")


@pytest.mark.parametrize(("code_page", "shown"), [("cp1252", "??"), ("cp936", "你好"), ("ascii", "??")])
def test_a_console_with_a_code_page_does_not_end_the_program(code_page: str, shown: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onecard", "recipes", "你好"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": f"{code_page}:strict"},
    )
    assert done.returncode == 2
    assert f"{shown}: 1 problem" in done.stderr.decode(code_page)


@pytest.mark.parametrize(
    ("number", "name", "expected"),
    [
        (1455, None, "memory and page file together are used up. Close other programs"),
        (
            3,
            "C:\\" + "runs\\" * 60 + "step-000010",
            "less than 260 characters, this one has 314",
        ),
        (3, "C:\\runs", "check that it exists"),
    ],
    ids=["page file", "long path", "missing"],
)
def test_errors_of_windows_are_explained(
    number: int, name: str | None, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class WindowsError(OSError):
        winerror = number

    def fail(*_: object, **__: object) -> None:
        raise WindowsError(errno.ENOENT, "what Windows says", name)

    from onecard.cli import main

    monkeypatch.setattr("onecard.cli.app.app", fail)
    with pytest.raises(SystemExit) as ended:
        main(["recipes"])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_small_page_file_is_explained_where_only_words_tell_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("The paging file is too small for this operation to complete. (os error 1455)")

    from onecard.cli import main

    monkeypatch.setattr("onecard.cli.app.app", fail)
    with pytest.raises(SystemExit) as ended:
        main(["recipes"])
    assert ended.value.code == 2
    assert "memory and page file together are used up. Close other programs" in capsys.readouterr().err


@pytest.mark.parametrize(("local_rank", "waits"), [("0", []), ("1", [10.0])])
def test_of_several_processes_the_first_is_given_time_to_tell(
    run, monkeypatch: pytest.MonkeyPatch, local_rank: str, waits: list[float]
) -> None:
    # torchrun ends all of them as soon as one has ended: one that is ahead would keep the other from saying why.
    slept: list[float] = []
    monkeypatch.setattr("onecard.cli.time.sleep", slept.append)
    place = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    done = run("train", "no-such-recipe.yaml")
    assert (done.code, slept) == (2, waits)
    assert "no-such-recipe.yaml" in done.stderr
