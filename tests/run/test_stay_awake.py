"""Sleep is inhibited while a run trains, and released whatever ends it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from onecard.run import stay_awake
from onecard.run.stay_awake import kept_awake


def test_windows_is_asked_and_told_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    kernel = SimpleNamespace(SetThreadExecutionState=asked.append)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)

    def train() -> None:
        with kept_awake():
            assert asked == [0x80000001]
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert asked == [0x80000001, 0x80000000]


@pytest.mark.skipif(sys.platform == "win32", reason="a script of a POSIX shell")
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_the_inhibitor_lives_as_long_as_the_run(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`systemd-inhibit` and `caffeinate` are scripts here that write down what they were asked, and wait."""
    name = "systemd-inhibit" if platform == "linux" else "caffeinate"
    script = tmp_path / name
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexec sleep 60\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(stay_awake.sys, "platform", platform)
    monkeypatch.setattr(stay_awake.os.path, "isdir", lambda path: path == "/run/systemd/system")
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: object, **settings: object) -> "subprocess.Popen[bytes]":
        started.append(popen(*arguments, **settings))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(stay_awake.subprocess, "Popen", start)
    with kept_awake():
        (inhibitor,) = started
        assert inhibitor.poll() is None
        assert str(os.getpid()) in " ".join(map(str, inhibitor.args))  # type: ignore[arg-type]
    assert inhibitor.returncode is not None


def test_a_system_that_cannot_be_asked_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stay_awake.sys, "platform", "linux")
    monkeypatch.setattr(stay_awake.shutil, "which", lambda _: None)
    with kept_awake():
        pass
