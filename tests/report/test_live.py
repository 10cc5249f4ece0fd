"""A run is followed by its record alone, also where it is cut back and goes on."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.report.live import Follower
from onecard.report.record import read_runs


def test_what_is_added_is_heard_once(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0, 2.0])
    record = root / "events.jsonl"
    whole = record.read_bytes()
    lines = whole.splitlines(keepends=True)
    record.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    follower = Follower(read_runs([root])[0])
    seen = follower.look()
    assert (seen.step and seen.step.step, len(seen.losses), seen.finished) == (5, 5, None)
    assert len(follower.look().losses) == 5
    record.write_bytes(whole)
    seen = follower.look()
    assert (seen.step and seen.step.step, len(seen.losses), seen.finished) == (20, 20, "completed")
    assert seen.best is not None
    assert seen.best.loss == 2.0


def test_a_record_that_was_cut_back_is_read_anew(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0, 2.0])
    record = root / "events.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(lines[:15]))
    follower = Follower(read_runs([root])[0])
    assert len(follower.look().losses) == 14
    # Cut back to step 8 and grown beyond where it was, with other losses, between two looks.
    other = [line.replace(b'"loss": 3.', b'"loss": 2.') for line in lines[8:]]
    record.write_bytes(b"".join([*lines[:8], *other]))
    seen = follower.look()
    assert len(seen.losses) == 20
    assert all(loss < 3 for loss in seen.losses[8:])


def test_a_run_that_is_resumed_has_not_ended(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0, 2.0])
    record = root / "events.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    end = lines[-1].replace(b"completed", b"interrupted")
    record.write_bytes(b"".join([*lines[:12], end]))
    follower = Follower(read_runs([root])[0])
    assert follower.look().finished == "interrupted"
    record.write_bytes(b"".join([*lines[:12], end, *lines[12:14]]))
    assert follower.look().finished is None


def test_a_run_without_a_record_waits(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0])
    follower = Follower(read_runs([root])[0])
    (root / "events.jsonl").unlink()
    seen = follower.look()
    assert (seen.step, seen.age_s, seen.finished) == (None, None, None)


def test_a_share_that_does_not_answer_is_looked_at_again(
    write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_run("a", [3.0, 2.0])
    record = root / "events.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(lines[:5]))
    follower = Follower(read_runs([root])[0])
    assert follower.look().problem is None

    def stale(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", stale)
        seen = follower.look()
        assert (seen.problem, seen.step and seen.step.step) == ("Stale file handle", 5)
    root.rename(root.with_name("away"))
    assert follower.look().problem == "No such file or directory"
    root.with_name("away").rename(root)
    record.write_bytes(b"".join(lines))
    seen = follower.look()
    assert (seen.problem, len(seen.losses), seen.finished) == (None, 20, "completed")
