"""A checkpoint is whole or absent, and what is damaged is named."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from onecard.checkpoint import (
    Parts,
    folder_of_step,
    is_being_read,
    list_checkpoints,
    move,
    read_checkpoint,
    reading,
    remove_leftovers,
    step_of_folder,
    write_checkpoint,
)
from onecard.checkpoint import folder as folder_module
from onecard.errors import CheckpointError
from onecard.spec import moving
from onecard.units import MIB


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code under test may catch it."""


def parts(value: float = 1.0, write_files: Callable[[Path], None] | None = None) -> Parts:
    def write_config(folder: Path) -> None:
        (folder / "config.json").write_text('{"a": 1}', encoding="utf-8")
        (folder / "extra").mkdir()
        (folder / "extra" / "merges.txt").write_text("字", encoding="utf-8")

    tensors = {
        "optimizer": {"a.b": torch.full((3,), value), "n": torch.tensor(7, dtype=torch.int32)},
        "scale": {"value": torch.tensor(2.0, dtype=torch.float64)},
    }
    return Parts(tensors, {"progress": {"step": 5, "name": "名", "best": None}}, write_files or write_config)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = folder_of_step(tmp_path / "checkpoints", 5)
    num_bytes = write_checkpoint(folder, parts())
    assert folder.name == "step-000005"
    assert step_of_folder(folder) == 5
    checkpoint = read_checkpoint(folder)
    tensors = checkpoint.tensors("optimizer")
    assert tensors.keys() == {"a.b", "n"}
    assert torch.equal(tensors["a.b"], torch.ones(3))
    assert torch.equal(tensors["n"], torch.tensor(7, dtype=torch.int32))
    assert checkpoint.tensors("scale")["value"].dtype == torch.float64
    assert checkpoint.document("progress") == {"step": 5, "name": "名", "best": None}
    assert (folder / "extra" / "merges.txt").read_text(encoding="utf-8") == "字"
    sizes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert num_bytes == checkpoint.num_tensor_bytes == sizes
    assert [path.name for path in folder.parent.iterdir()] == ["step-000005"]


def test_views_of_one_buffer_are_saved_each(tmp_path: Path) -> None:
    stacked = torch.arange(12.0).view(3, 2, 2)
    views = dict(zip("abc", stacked.unbind(), strict=True)) | {"t": stacked[0].T}
    write_checkpoint(tmp_path / "step-1", Parts({"muon": views}, {}, lambda folder: None))
    found = read_checkpoint(tmp_path / "step-1").tensors("muon")
    assert all(torch.equal(found[name], tensor) for name, tensor in views.items())


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    for step in (1_000_000, 9, 500):
        write_checkpoint(folder_of_step(tmp_path, step), parts())
    (tmp_path / "step-000700").mkdir()
    (tmp_path / "step-final").mkdir()
    (tmp_path / "damaged-step-000009").mkdir()
    assert [step_of_folder(path) for path in list_checkpoints(tmp_path)] == [9, 500, 1_000_000]
    assert list_checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize("moment", ["force_to_disk", "_replace_folder", "_write_json", "save_file"])
def test_a_process_killed_while_writing_leaves_nothing_that_counts(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise Killed

    write_checkpoint(folder_of_step(tmp_path, 1), parts())
    with monkeypatch.context() as patched:
        patched.setattr(folder_module, moment, kill)
        with pytest.raises(Killed):
            write_checkpoint(folder_of_step(tmp_path, 2), parts())
    assert (tmp_path / ".step-000002.partial").is_dir()
    assert list_checkpoints(tmp_path) == [folder_of_step(tmp_path, 1)]
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_checkpoint(folder_of_step(tmp_path, 2))
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    read_checkpoint(folder_of_step(tmp_path, 1))


def test_what_a_killed_process_left_is_not_mixed_in(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-000002.partial"
    leftover.mkdir()
    (leftover / "stale.bin").write_bytes(b"old")
    write_checkpoint(folder_of_step(tmp_path, 2), parts())
    assert not (folder_of_step(tmp_path, 2) / "stale.bin").exists()
    assert not leftover.exists()


def test_an_existing_checkpoint_is_replaced(tmp_path: Path) -> None:
    folder = folder_of_step(tmp_path, 2)
    write_checkpoint(folder, parts(1.0))
    write_checkpoint(folder, parts(2.0))
    assert read_checkpoint(folder).tensors("optimizer")["a.b"].tolist() == [2.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), r"no space left for checkpoint .*save_total_limit"),
    (SafetensorError("Error while serializing: No space left on device (os error 28)"), "no space left"),
    (PermissionError(errno.EACCES, "denied"), "cannot be written: .*denied"),
]


@pytest.mark.parametrize(("error", "message"), FAILURES, ids=["full", "full inside safetensors", "denied"])
def test_a_failed_write_leaves_the_earlier_ones_alone(error: Exception, message: str, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.bin").write_bytes(b"x" * 100)
        raise error

    write_checkpoint(folder_of_step(tmp_path, 1), parts())
    write_checkpoint(folder_of_step(tmp_path, 2), parts())
    before = contents(tmp_path)
    for step in (2, 3):
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(folder_of_step(tmp_path, step), parts(2.0, fail))
    assert contents(tmp_path) == before


def test_a_write_that_runs_out_of_memory_leaves_no_half(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.bin").write_bytes(b"x" * 100)
        raise MemoryError

    write_checkpoint(folder_of_step(tmp_path, 1), parts())
    with pytest.raises(MemoryError):
        write_checkpoint(folder_of_step(tmp_path, 2), parts(2.0, fail))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_failure_of_the_disk_at_the_last_moment_leaves_the_earlier_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(folder_of_step(tmp_path, 1), parts())
    before = contents(tmp_path)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="input/output error"):
        write_checkpoint(folder_of_step(tmp_path, 2), parts())
    assert contents(tmp_path) == before


FILES = ["config.json", "extra/merges.txt", "optimizer.safetensors", "scale.safetensors", "progress.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(damage: str, name: str, tmp_path: Path) -> None:
    folder = folder_of_step(tmp_path, 2)
    write_checkpoint(folder, parts())
    path = folder / name
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert path.name in str(caught.value)
    named = [other for other in FILES if Path(other).name in str(caught.value)]
    assert named == [name]


def test_all_damaged_files_are_named_together(tmp_path: Path) -> None:
    folder = folder_of_step(tmp_path, 2)
    write_checkpoint(folder, parts())
    for name in FILES:
        (folder / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert all(Path(name).name in str(caught.value) for name in FILES)


def test_no_flipped_bit_of_the_manifest_is_a_traceback(tmp_path: Path) -> None:
    folder = folder_of_step(tmp_path, 2)
    write_checkpoint(folder, Parts({}, {"progress": 1}, lambda folder: None))
    path = folder / "manifest.json"
    content = path.read_bytes()
    noticed = 0
    for place in range(len(content)):
        for bit in (0, 6):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with suppress(CheckpointError):
                read_checkpoint(folder)
                continue
            noticed += 1
    # What is not noticed is white space between the words.
    assert noticed > 0.9 * 2 * len(content.replace(b" ", b"").replace(b"\n", b""))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1, "files": []}', '{"format_version": 1}'])
def test_a_manifest_without_its_content_is_refused(content: str, tmp_path: Path) -> None:
    folder = folder_of_step(tmp_path, 2)
    write_checkpoint(folder, parts())
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        read_checkpoint(folder)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    folder = folder_of_step(tmp_path, 2)
    write_checkpoint(folder, parts())
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 3, "files": []}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="has checkpoint format 3, this onecard reads 1 to 2"):
        read_checkpoint(folder)


def test_a_disk_without_room_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(folder_of_step(tmp_path, 1), parts())
    before = contents(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20 * MIB))
    with pytest.raises(CheckpointError, match=r"no space left .*20\.0 MiB free"):
        write_checkpoint(folder_of_step(tmp_path, 2), parts(write_files=lambda _: pytest.fail("begun in vain")))
    assert contents(tmp_path) == before


def test_a_process_killed_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, moves = folder_of_step(tmp_path, 2), iter(range(10))
    write_checkpoint(folder, parts(1.0))

    def die(source: Path, target: Path) -> None:
        if next(moves) == 1:
            raise Killed
        source.replace(target)

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "move", die)
        with pytest.raises(Killed):
            write_checkpoint(folder, parts(2.0))
    assert not folder.exists()
    remove_leftovers(tmp_path)
    assert read_checkpoint(folder).tensors("optimizer")["a.b"].tolist() == [1.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_rename_that_a_scanner_blocks_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals, replace = iter(range(10)), Path.replace

    def blocked(self: Path, target: Path) -> Path:
        if next(refusals) < 3:
            raise PermissionError(13, "in use by another process")
        return replace(self, target)

    monkeypatch.setattr(moving, "_PAUSES_S", (0.0,) * 6)
    monkeypatch.setattr(Path, "replace", blocked)
    monkeypatch.setattr(moving.sys, "platform", "win32")
    (tmp_path / "a").write_text("x", encoding="utf-8")
    move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text(encoding="utf-8") == "x"


def test_what_is_read_is_known_until_its_reader_ends(tmp_path: Path) -> None:
    folder = folder_of_step(tmp_path / "checkpoints", 2)
    write_checkpoint(folder, parts())
    assert not is_being_read(folder)
    with reading(folder):
        assert is_being_read(folder)
        assert not is_being_read(folder_of_step(tmp_path / "checkpoints", 3))
    assert not is_being_read(folder)
    program = (
        "import os, sys; from pathlib import Path; from onecard.checkpoint.reading import reading\n"
        "with reading(Path(sys.argv[1])): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=False, timeout=60)
    assert list(folder.parent.glob(".reading-*"))
    assert not is_being_read(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["step-000002"]


def test_a_folder_that_moved_is_still_whole(tmp_path: Path) -> None:
    write_checkpoint(folder_of_step(tmp_path, 2), parts())
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    read_checkpoint(tmp_path / "elsewhere" / "step-000002")
