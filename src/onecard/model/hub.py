"""Existing models by name: a local folder, the Hugging Face Hub (mirrors by HF_ENDPOINT), or ModelScope."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from onecard.errors import CheckpointError, InputError
from onecard.model.hub_files import (
    NETWORK_ERRORS,
    SMALL_FILES,
    OnProgress,
    RemoteFile,
    choose_files,
    fetch_large,
    verify,
)
from onecard.model.weight_files import find_weight_files, read_headers
from onecard.spec.paths import is_hub_name, locate

log = logging.getLogger("onecard.model")

MODELSCOPE = "modelscope:"
_MIRROR_HINT = "where huggingface.co cannot be reached, set HF_ENDPOINT=https://hf-mirror.com before you start"


def find_base(name: str, *, weights: bool = True, progress: OnProgress | None = None) -> Path:
    """Finds the folder of a model: one that is given, or one of the Hugging Face Hub or of ModelScope, downloaded.

    Only what training needs is fetched: config, tokenizer and, with `weights`, one set of weight files. A download that
    broke off goes on where it stopped; content is compared with the hashes the Hub gives, once per file. Without a
    network, or with HF_HUB_OFFLINE, the cache serves.

    Raises:
        InputError: no such folder or model, only an adapter, or it cannot be reached and is not in the cache.
        CheckpointError: damaged, cut or missing files, each named with what to do.
    """
    folder = _find_folder(name, weights=weights, progress=progress)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{folder} holds an adapter, which is no whole model: start from the model it belongs to, or merge the "
                "two first (PEFT's merge_and_unload) and start from what save_pretrained then writes"
            )
        raise CheckpointError(
            f"{folder} is no model folder: it has no config.json. Give one that `save_pretrained` wrote"
        )
    verify(folder)
    if weights:
        read_headers([file for file in find_weight_files(folder) if file.suffix == ".safetensors"])
    return folder


def find_cached(name: str, *, weights: bool = True) -> Path | None:
    """Finds a model that is on this machine, without a network; None where it is not, or not whole."""
    try:
        folder = _find_local(name) or _from_cache(name)
        if folder is None or not (folder / "config.json").is_file():
            return None
        if weights:
            find_weight_files(folder)
    except InputError:
        return None
    return folder


def _find_folder(name: str, *, weights: bool, progress: OnProgress | None) -> Path:
    if (folder := _find_local(name)) is not None:
        return folder
    if name.startswith(MODELSCOPE):
        return _from_modelscope(name.removeprefix(MODELSCOPE), weights=weights)
    if not is_hub_name(name):
        raise InputError(
            f"model_name_or_path {name!r} is no folder (looked in {Path.cwd()}) and no name of a model, which is "
            "owner/name: check the spelling"
        )
    with _without_bars():
        return _from_hub(name, weights=weights, progress=progress)


def _find_local(name: str) -> Path | None:
    path = locate(name) if name else None
    if path is None:
        return None
    if not path.is_dir():
        raise InputError(f"model_name_or_path {name!r} is a file: give the folder it lies in")
    return path.absolute()


def _from_hub(name: str, *, weights: bool, progress: OnProgress | None) -> Path:
    if constants.HF_HUB_OFFLINE:
        if (folder := _from_cache(name)) is None:
            raise InputError(
                f"model {name!r} is no folder in {Path.cwd()} and not in the cache ({constants.HF_HUB_CACHE}), and "
                "HF_HUB_OFFLINE forbids to fetch it: unset HF_HUB_OFFLINE once, or give a folder of your own by "
                "--model_name_or_path"
            )
        return folder
    try:
        info = HfApi().model_info(name, files_metadata=True)
        files = choose_files([RemoteFile.of(sibling) for sibling in info.siblings or ()], weights=weights)
        assert info.sha is not None
        for file in files:
            fetch_large(name, info.sha, file, progress)
        return Path(
            snapshot_download(name, revision=constants.DEFAULT_REVISION, allow_patterns=[f.name for f in files])
        )
    except InputError:
        raise
    except NETWORK_ERRORS as error:
        if (folder := _from_cache(name)) is not None:
            _say_once(f"{name}: {constants.ENDPOINT} cannot be used ({_reason(error)}), so the cache serves: {folder}")
            return folder
        raise InputError(_explain(name, error)) from error


def _from_cache(name: str) -> Path | None:
    if name.startswith(MODELSCOPE) or not is_hub_name(name):
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=["config.json"]))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def _explain(name: str, error: Exception) -> str:
    asked = f"{constants.ENDPOINT} for model {name!r}"
    if isinstance(error, GatedRepoError):
        return (
            f"asked {asked}: its owner lets only those in who have agreed to the terms. Agree on its page, then log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"asked {asked}: there is none, or it is private; nor is there a folder of this name in {Path.cwd()}. "
            "Check the spelling (owner/name); for a private one log in with `hf auth login`"
        )
    return (
        f"asked {asked} without success ({_reason(error)}), and it is not in the cache. Start again when there is a "
        f"network: what has arrived is kept; {_MIRROR_HINT}; or give a folder of your own by --model_name_or_path"
    )


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def _from_modelscope(name: str, *, weights: bool) -> Path:
    if not is_hub_name(name) or "/" not in name:
        raise InputError(f"{MODELSCOPE}{name} is no model of ModelScope: write {MODELSCOPE}Owner/Name")
    try:
        download = importlib.import_module("modelscope").snapshot_download
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{MODELSCOPE}{name} needs the package modelscope, which cannot be loaded here ({error}): install it with "
            f"pip install 'onecard[modelscope]', or take the model from the Hugging Face Hub; {_MIRROR_HINT}"
        ) from error
    patterns = [*SMALL_FILES, *(("*.safetensors", "model.safetensors.index.json") if weights else ())]
    try:
        return Path(download(name, allow_patterns=patterns))
    except Exception as error:  # its errors share no class
        raise InputError(
            f"asked ModelScope for model {name!r} without success ({_reason(error)}): check the spelling and the "
            "network"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps the hub's progress bars out of ours."""
    was_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            enable_progress_bars()
