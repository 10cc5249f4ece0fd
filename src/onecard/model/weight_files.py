"""The weight files of a model folder: which they are, whether they are whole, and whose weights they hold.

Reads headers and samples, never whole files, and needs no PyTorch.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.errors import CheckpointError

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
# Of safetensors' types, those that weights of a language model come in, and their widths.
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F64", "F32", "F16", "BF16")
# What older files hold although it is computed: causal masks of GPT-2, rotary frequencies.
COMPUTED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
# A header is a few MB at most; a damaged file may claim anything.
_MAX_HEADER_BYTES = 100 * 2**20
# Places of a tensor, and bytes at each, that its fingerprint looks at.
_NUM_SAMPLES, _SAMPLE_BYTES = 32, 32


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file; `dtype` is safetensors' word, `start` and `stop` are bytes of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def find_weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder: safetensors, all shards of them, and PyTorch's own only where there are none.

    Raises:
        CheckpointError: there are none, or shards that the index names are missing (each is named).
    """
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}{_INDEX}").is_file():
            files = [folder / shard for shard in shards_of(folder / f"{name}{_INDEX}")]
            if missing := [file.name for file in files if not file.is_file()]:
                raise CheckpointError(
                    f"{folder}: {len(missing)} of {len(files)} weight files are missing ({', '.join(missing)}), which "
                    f"{name}{_INDEX} names: copy or download them again"
                )
            return files
    raise CheckpointError(
        f"{folder} holds no weights: it has no {SAFETENSORS}, none in shards, and no {PICKLED}. Give a folder that "
        "`save_pretrained` wrote"
    )


def shards_of(index: Path) -> list[str]:
    """Names of the files that an index names.

    Raises:
        CheckpointError: it cannot be read, or names a file elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files of its own folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error}): copy or download it again") from error
    return names


def read_headers(files: list[Path]) -> list[StoredTensor]:
    """All tensors of safetensors files, by name, after checking that each file is as long as its header says.

    Raises:
        CheckpointError: damaged or cut files, all of them together.
    """
    tensors, problems = [], []
    for file in files:
        try:
            tensors += list(_read_header(file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            is_ours = isinstance(error, OSError) or type(error) is ValueError
            problems.append(f"{file}: {error if is_ours else 'its header is no list of tensors'}")
    if problems:
        raise CheckpointError(
            f"damaged weights: {'; '.join(problems)}. Delete what is named and copy or download it again"
        )
    return sorted(tensors, key=lambda tensor: tensor.name)


def _read_header(path: Path) -> Iterator[StoredTensor]:
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError("no safetensors file, or cut off")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    if not isinstance(header, dict):
        raise ValueError("its header is no list of tensors")
    header.pop("__metadata__", None)
    first = 8 + header_bytes
    needed = first + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if num_bytes != needed:
        raise ValueError(f"{num_bytes} bytes instead of {needed}")
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        width = _WIDTHS.get(entry["dtype"])
        if width is not None and stop - start != width * math.prod(entry["shape"]):
            raise ValueError(f"{name} has {stop - start} bytes, which is not its shape {entry['shape']}")
        yield StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), first + start, first + stop)


def refuse_integers(tensors: list[StoredTensor]) -> None:
    """Refuses weights that no arithmetic of training can use as they are: integers, and floats of 8 bits.

    Raises:
        CheckpointError: with their number and the first of them.
    """
    found = [t for t in tensors if t.dtype not in _FLOATS and not t.name.endswith(COMPUTED)]
    if found:
        kinds = ", ".join(sorted({tensor.dtype for tensor in found}))
        raise CheckpointError(
            f"{found[0].file.parent}: {len(found)} of its weights are stored as {kinds} (the first is "
            f"{found[0].name}), most likely a quantized model whose scales lie elsewhere: cast to numbers they would "
            "mean nothing. Use the model in 16 or 32 bits; method qlora quantizes it itself"
        )


def is_16_bit(files: list[Path]) -> str | None:
    """The one 16-bit type, `BF16` or `F16`, that all floating-point weights are stored in; None for anything else."""
    if any(file.suffix != ".safetensors" for file in files):
        return None
    dtypes = {tensor.dtype for tensor in read_headers(files) if "F" in tensor.dtype}
    return dtypes.pop() if dtypes in ({"BF16"}, {"F16"}) else None


def fingerprint(folder: Path) -> str:
    """Hashes names, types, shapes and a thousand bytes of each tensor, spread over it: 16 hex digits.

    Two trainings of one architecture never agree, however the tensors are spread over files. Some ten milliseconds for
    each billion parameters, once the disk has answered. Damage elsewhere in a file is not its business.

    Raises:
        CheckpointError: no weights, or damaged ones.
    """
    files = find_weight_files(folder)
    digest = hashlib.sha256()
    if files[0].suffix == ".safetensors":
        places = [(t.file, f"{t.name} {t.dtype} {t.shape}", t.start, t.stop) for t in read_headers(files)]
    else:
        places = [(file, str(file.stat().st_size), 0, file.stat().st_size) for file in files]
    for path, words, start, stop in places:
        digest.update(words.encode("utf-8"))
        with path.open("rb") as file:
            for place in range(_NUM_SAMPLES):
                file.seek(start + (stop - start) * place // _NUM_SAMPLES)
                digest.update(file.read(min(_SAMPLE_BYTES, stop - file.tell())))
    return digest.hexdigest()[:16]
