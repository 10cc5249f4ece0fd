"""Files of a model on the Hugging Face Hub: which are needed, a download that can go on, and whether they are whole.

The hub's client begins a file anew when its process has ended; models are large enough that this hurts. So large files
are fetched here, into the place in its cache where it looks for them (`blobs/<sha256>`), and it does the rest.
"""

import fnmatch
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from onecard.errors import CheckpointError, InputError
from onecard.units import format_bytes

# httpx's own class, under whichever name the hub's client has it, and OSError.
NETWORK_ERRORS = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
OnProgress = Callable[[str, int, int], None]  # file, bytes that are here, bytes of the whole

SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template*", "additional_chat_templates/*.jinja"),
)
# The first kind of weights that a model has is taken.
_WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
# From here on a second beginning is worth avoiding.
_LARGE_BYTES = 8 * 2**20
# Attempts in a row that bring nothing, and the time between them.
_NUM_ATTEMPTS, _PAUSE_S = 5, 1.0
_VERIFIED = "onecard-verified.json"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model on the Hub; `sha256` is known of those in large-file storage."""

    name: str
    num_bytes: int
    sha256: str | None

    @classmethod
    def of(cls, sibling: Any) -> "RemoteFile":
        """The same from the hub's own description."""
        return cls(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None)


def choose_files(files: Iterable[RemoteFile], *, weights: bool) -> list[RemoteFile]:
    """Chooses what training needs: config, tokenizer and one set of weights, safetensors where there are any.

    Raises:
        InputError: the model has no weights that can be read.
    """
    files = list(files)
    chosen = [file for file in files if _matches(file.name, SMALL_FILES)]
    if not weights:
        return chosen
    for patterns in _WEIGHTS:
        if any(file.name == patterns[0] for file in files):
            return chosen + [file for file in files if _matches(file.name, patterns)]
    raise InputError(
        "this model has neither model.safetensors nor pytorch_model.bin, whole or in shards: its weights are in a form "
        "that transformers does not read (GGUF, ONNX, an adapter ...). Name the model it was made from"
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def fetch_large(model: str, commit: str, file: RemoteFile, progress: OnProgress | None) -> None:
    """Fetches a large file into the hub's cache, from where an earlier attempt stopped; does nothing for others.

    Raises:
        InputError: no space for it, or what arrived is not what the Hub has.
    """
    if file.sha256 is None or file.num_bytes < _LARGE_BYTES:
        return
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model") / "blobs"
    blob, partial = blobs / file.sha256, blobs / f"{file.sha256}.onecard-partial"
    blobs.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{partial}.lock"):
        if blob.is_file():
            return
        arrived = partial.stat().st_size if partial.is_file() else 0
        free = shutil.disk_usage(blobs).free
        if free < file.num_bytes - arrived:
            raise InputError(
                f"{model}: {file.name} needs {format_bytes(file.num_bytes - arrived)} in {blobs}, where "
                f"{format_bytes(free)} are free: free some, or set HF_HOME to a larger disk"
            )
        _download(hf_hub_url(model, file.name, revision=commit), partial, file, progress)
        if _sha256(partial) != file.sha256:
            partial.unlink()
            raise InputError(
                f"{model}: what arrived as {file.name} is not what the Hub has; it is deleted. Start again, and choose "
                "another mirror if this repeats"
            )
        partial.replace(blob)
        _remember(blob)
    with suppress(OSError):  # another process may hold it
        Path(f"{partial}.lock").unlink()


def _download(url: str, partial: Path, file: RemoteFile, progress: OnProgress | None) -> None:
    location = get_hf_file_metadata(url).location
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if urlsplit(location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # another host must not see the token
    if partial.is_file() and partial.stat().st_size > file.num_bytes:
        partial.unlink()
    partial.touch()
    attempts_left, furthest = _NUM_ATTEMPTS, partial.stat().st_size
    while partial.stat().st_size < file.num_bytes:
        failure: Exception = OSError("the server ends before the file does")
        try:
            _append(location, headers, partial, file, progress)
        except HfHubHTTPError:
            raise
        except NETWORK_ERRORS as error:
            failure = error
        arrived = partial.stat().st_size
        attempts_left = _NUM_ATTEMPTS if arrived > furthest else attempts_left - 1
        furthest = max(furthest, arrived)
        if attempts_left == 0:
            raise failure
        if arrived < file.num_bytes:
            time.sleep(_PAUSE_S)


def _append(
    location: str, headers: dict[str, str], partial: Path, file: RemoteFile, progress: OnProgress | None
) -> None:
    arrived = partial.stat().st_size
    asked = headers | ({"Range": f"bytes={arrived}-"} if arrived else {})
    with get_session().stream("GET", location, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        goes_on = response.status_code == 206  # else the server begins anew
        with partial.open("ab" if goes_on else "wb") as sink:
            for chunk in response.iter_raw():
                sink.write(chunk)
                if progress is not None:
                    progress(file.name, sink.tell(), file.num_bytes)


def verify(folder: Path) -> None:
    """Compares files of the hub's cache with the hashes they are named after, each file once; other folders have none.

    Raises:
        CheckpointError: damaged files, all of them together.
    """
    damaged = []
    for path in sorted(folder.iterdir()):
        blob = path.resolve()
        if path.is_file() and blob.parent.name == "blobs" and not _is_known(blob):
            if _is_whole(blob):
                _remember(blob)
            else:
                damaged.append(f"{path.name} ({blob})")
    if damaged:
        raise CheckpointError(
            f"{folder}: {', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} damaged, their content is not what "
            "was downloaded: delete the file named in brackets and start again, then it is fetched anew"
        )


def _is_whole(blob: Path) -> bool:
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return _sha256(blob) == blob.name
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):  # a small file, by its name in git
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob.name
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_known(blob: Path) -> bool:
    return _known(blob).get(blob.name) == _stamp(blob)


def _known(blob: Path) -> dict[str, Any]:
    try:
        known = json.loads((blob.parent.parent / _VERIFIED).read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _stamp(blob: Path) -> list[int]:
    status = blob.stat()
    return [status.st_size, status.st_mtime_ns]


def _remember(blob: Path) -> None:
    content = json.dumps(_known(blob) | {blob.name: _stamp(blob)}, indent=1)
    beside = blob.parent.parent / f".{_VERIFIED}"
    try:
        beside.write_text(content, encoding="utf-8")
        beside.replace(blob.parent.parent / _VERIFIED)
    except OSError:
        return  # a cache that may not be written: hashed again next time
