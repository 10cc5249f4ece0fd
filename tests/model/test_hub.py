"""Models by name: fetched once, whole, from where a download broke off, and explained where they cannot be had."""

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, HubServer, running_hub
from huggingface_hub import constants
from safetensors.torch import save

from onecard.errors import CheckpointError, InputError
from onecard.model import hub, hub_files
from onecard.model.hub import find_base, find_cached

WEIGHTS = save({"a": torch.arange(1_000_000.0)}, {"format": "pt"})
NAME = "org/tiny"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub() as server:
        server.files[NAME] = {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"x",
            "README.md": b"much",
            "model.safetensors": WEIGHTS,
            "pytorch_model.bin": b"pickled",
            "onnx/model.onnx": b"other",
        }
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_files, "_LARGE_BYTES", 1_000_000)
        monkeypatch.setattr(hub_files, "_PAUSE_S", 0.0)
        hub._say_once.cache_clear()
        yield server


def files_asked(server: HubServer) -> list[str]:
    return [path.rsplit("/", 1)[-1] for command, path, _ in server.requests if command == "GET" and "/resolve/" in path]


def blob_of(content: bytes, tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--org--tiny" / "blobs" / hashlib.sha256(content).hexdigest()


def test_what_training_needs_is_fetched_once(server: HubServer) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = find_base(NAME, progress=lambda *state: seen.append(state))
    assert folder.name == COMMIT
    expected = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == expected
    assert set(files_asked(server)) == expected
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert seen[-1] == ("model.safetensors", len(WEIGHTS), len(WEIGHTS))
    server.requests.clear()
    assert find_base(NAME) == folder == find_cached(NAME)
    assert not files_asked(server)


def test_without_weights_none_are_fetched(server: HubServer) -> None:
    folder = find_base(NAME, weights=False)
    assert not (folder / "model.safetensors").exists()
    assert find_cached(NAME) is None
    assert find_cached(NAME, weights=False) == folder
    assert (find_base(NAME) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_broken_download_goes_on_where_it_stopped(server: HubServer, tmp_path: Path) -> None:
    arrived = 2_500_000
    partial = blob_of(WEIGHTS, tmp_path)
    partial = partial.with_name(f"{partial.name}.onecard-partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:arrived])  # what a process that was killed leaves
    folder = find_base(NAME)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [
        asked for command, path, asked in server.requests if command == "GET" and path.endswith("model.safetensors")
    ]
    assert ranges == [f"bytes={arrived}-"]
    assert not partial.exists()


def test_a_connection_that_breaks_is_taken_up_and_what_arrived_is_kept(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.break_after = 1_500_000
    assert (find_base(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [
        asked for command, path, asked in server.requests if command == "GET" and path.endswith("model.safetensors")
    ]
    assert ranges == [None, "bytes=1500000-", "bytes=3000000-"]


def test_a_download_that_brings_nothing_ends_and_keeps_what_arrived(server: HubServer, tmp_path: Path) -> None:
    server.break_after = 0
    with pytest.raises(InputError, match="what has arrived is kept"):
        find_base(NAME)
    assert len(files_asked(server)) == 5


def test_wrong_content_is_refused_and_not_kept(server: HubServer, tmp_path: Path) -> None:
    server.replace["model.safetensors"] = bytes(len(WEIGHTS))
    with pytest.raises(InputError, match=r"what arrived as model\.safetensors is not what the Hub has"):
        find_base(NAME)
    server.replace.clear()
    assert (find_base(NAME) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_damaged_in_the_cache_is_named(name: str, server: HubServer, tmp_path: Path) -> None:
    folder = find_base(NAME)
    blob = (folder / name).resolve()
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    os.utime(blob, (1, 1))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{name} .*damaged.*delete the file named in brackets"):
            find_base(NAME)
    blob.unlink()
    assert find_base(NAME) == folder


def test_a_file_is_hashed_once(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    whole = hub_files._sha256
    monkeypatch.setattr(hub_files, "_sha256", lambda path: hashed.append(path.name) or whole(path))
    for _ in range(3):
        find_base(NAME)
    assert len(hashed) == 1


def test_offline_the_cache_serves_and_says_so_once(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = find_base(NAME)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_base(NAME) == folder
    assert not server.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, "onecard.model"):
        assert find_base(NAME) == folder
        assert find_base(NAME) == folder
    assert [record.message.split(" ")[1] for record in caplog.records if record.name == "onecard.model"] == [
        "http://127.0.0.1:9"
    ]


def test_what_cannot_be_had_is_explained(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.gated.add("org/closed")
    server.files["org/gguf"] = {"config.json": b"{}", "model.gguf": b"x"}
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    for name, message in (
        ("org/tyni", r"there is none, or it is private; nor is there a folder of this name.*Check the spelling"),
        ("org/closed", r"agreed to the terms.*hf auth login"),
        ("org/gguf", r"neither model\.safetensors nor pytorch_model\.bin"),
        ("no/such/folder", r"is no folder \(looked in .*\) and no name of a model"),
        ("", r"is no folder"),
        (str(tmp_path / "file"), "is a file: give the folder"),
        (str(tmp_path / "empty"), r"it has no config\.json"),
        (str(tmp_path / "adapter"), "holds an adapter, which is no whole model"),
        ("modelscope:one", "write modelscope:Owner/Name"),
    ):
        with pytest.raises(InputError, match=message):
            find_base(name)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"asked http://127\.0\.0\.1:9 .*not in the cache.*hf-mirror\.com"):
        find_base(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids"):
        find_base(NAME)


def test_modelscope_is_asked_through_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(InputError, match=r"needs the package modelscope.*onecard\[modelscope\]"):
        find_base("modelscope:Org/Name")
    package = type(sys)("modelscope")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    package.snapshot_download = lambda name, allow_patterns: str(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    assert find_base("modelscope:Org/Name", weights=False) == tmp_path


def test_a_mirror_is_named_by_the_environment(server: HubServer, tmp_path: Path) -> None:
    script = f"from onecard.model.hub import find_base; print(find_base({NAME!r}))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")
