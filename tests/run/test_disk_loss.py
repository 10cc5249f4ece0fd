"""An error of a disk that may answer again is told from one that says no, also where another was made from it."""

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError
from torch import zeros

from onecard.checkpoint import Parts, folder_of_step, manifest, read_checkpoint, write_checkpoint
from onecard.checkpoint import folder as module
from onecard.errors import CheckpointError
from onecard.run.disk_loss import is_disk_lost
from onecard.run.folder import RunFolder


class WindowsError64(OSError):
    winerror = 64


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ETIMEDOUT, errno.ENXIO])
def test_a_disk_that_may_answer_again(code: int) -> None:
    assert is_disk_lost(OSError(code, "gone"))


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EPIPE])
def test_a_disk_that_says_no(code: int) -> None:
    assert not is_disk_lost(OSError(code, "no"))


def test_what_windows_says() -> None:
    assert is_disk_lost(WindowsError64(errno.EINVAL, "The specified network name is no longer available"))
    error = WindowsError64(errno.EINVAL, "The parameter is incorrect")
    error.winerror = 87
    assert not is_disk_lost(error)


def test_an_error_that_was_made_from_another() -> None:
    made = CheckpointError("cannot be read")
    made.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    assert is_disk_lost(made)
    beside = ValueError()
    beside.__context__ = OSError(errno.EIO, "Input/output error")
    assert is_disk_lost(beside)
    beside.__suppress_context__ = True
    assert not is_disk_lost(beside)


def parts() -> Parts:
    return Parts({"weights": {"a": zeros(3)}}, {}, lambda _: None)


@pytest.mark.parametrize(("code", "is_lost"), [(errno.EIO, True), (errno.ENOSPC, False)])
def test_a_checkpoint_that_cannot_be_written(
    code: int, is_lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: of some kind (os error {code})")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(CheckpointError, match="cannot be written" if is_lost else "no space left") as caught:
        write_checkpoint(folder_of_step(tmp_path, 1), parts())
    assert is_disk_lost(caught.value) == is_lost


def test_a_run_none_of_whose_checkpoints_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    place = folder_of_step(folder.checkpoints, 1)
    write_checkpoint(place, parts())
    weights = place / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"damage")
    with pytest.raises(CheckpointError) as caught:
        folder.find_resumable()
    assert not is_disk_lost(caught.value)

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("onecard.checkpoint.manifest._sha256", fail)
    weights.write_bytes(whole)
    with pytest.raises(CheckpointError) as caught:
        folder.find_resumable()
    assert is_disk_lost(caught.value)
    assert place.is_dir()


@pytest.mark.parametrize(("code", "is_waited_for"), [(errno.ESTALE, True), (errno.ENOTCONN, True), (errno.EIO, False)])
def test_a_share_that_does_not_answer_for_a_moment_damages_nothing(
    code: int, is_waited_for: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector says EIO as well: there the checkpoint before is used."""
    folder = RunFolder(tmp_path)
    older, newer = (folder_of_step(folder.checkpoints, step) for step in (1, 2))
    for place in (older, newer):
        write_checkpoint(place, parts())
    digest = manifest._sha256

    def fail(path: Path) -> str:
        if path.parent == newer:
            raise OSError(code, "what the disk says", str(path))
        return digest(path)

    monkeypatch.setattr(manifest, "_sha256", fail)
    if not is_waited_for:
        assert folder.find_resumable() == older
        return
    with pytest.raises(CheckpointError) as caught:
        folder.find_resumable()
    assert is_disk_lost(caught.value)
    monkeypatch.undo()
    assert folder.find_resumable() == newer


def test_a_checkpoint_does_not_bring_back_the_folder_of_a_share(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(folder_of_step(tmp_path / "run" / "checkpoints", 1), parts())
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    place = folder_of_step(tmp_path / "run" / "checkpoints", 1)
    write_checkpoint(place, parts())
    read_checkpoint(place)
