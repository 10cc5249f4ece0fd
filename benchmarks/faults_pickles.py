"""Pickles and code that run a command as soon as they are loaded, put wherever onecard reads; part of faults.py."""

import io
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import malformed_cases

BESIDE = (
    *("pytorch_model.bin", "pytorch_model.pt", "adapter_model.bin", "model.pth", "consolidated.00.pth", "state.pt"),
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "0.pkl"),
    *("meta.pkl", "tokenizer.pkl", "tokenizer.pickle", "vocab.pkl", "dataset.pkl", "cache.pkl", "state.pickle"),
    *("tokens.npy", "heldout.npy", "tokens.npz", "model.joblib", "data.pt", "cache-0.arrow", "manifest.pkl"),
)
_READ_WEIGHTS = (
    *("resume run", "resume run --verify 2", "resume chatrun", "evaluate run", "generate run --prompt the"),
    *("generate base --prompt the", "chat chatrun", "serve base --port 0", "export run --to hf"),
    *("export chatrun --to merged", "plan chat.yaml", "prepare tiny.yaml", "train chat.yaml --output_dir chatout"),
)
_READ_CONFIGS = (
    *("resume chatrun", "evaluate run", "generate run --prompt the", "generate base --prompt the", "chat base"),
    *(
        "chat chatrun",
        "serve base --port 0",
        "export base --to gguf",
        "plan chat.yaml",
        "prepare tiny.yaml --dataset data",
    ),
    *("prepare tiny.yaml --tokenizer base", "train chat.yaml --model_name_or_path nobody/model"),
)
_READ_PARQUET = ("prepare tiny.yaml --dataset text.parquet", "prepare chat.yaml --dataset chats.parquet")
VERBS = (
    *("resume run", "resume run --verify 2", "resume chatrun", "report run", "monitor run --once"),
    *("compare run chatrun", "replay run --step 3 --loss", "replay chatrun --step 2 --loss"),
    *("evaluate run", "evaluate chatrun", "evaluate base --text text.txt"),
    *("generate run --prompt the", "generate base --prompt the", "generate chatrun --prompt the"),
    *("chat chatrun", "chat run", "serve base --port 0", "serve chatrun --port 0"),
    *("export run --to hf", "export chatrun --to merged", "export chatrun --to adapter", "export base --to gguf"),
    *("plan --explain run", "plan tiny.yaml", "plan chat.yaml", "cards"),
    *("prepare tiny.yaml --dataset data", "prepare tiny.yaml --dataset text.parquet"),
    *("prepare chat.yaml --dataset chats.parquet", "prepare chat.yaml --chat_template base"),
    *("prepare tiny.yaml --dataset nobody/nothing", "train tiny.yaml --tokenizer base --output_dir out"),
    *("train chat.yaml --output_dir chatout", "train chat.yaml --model_name_or_path nobody/model"),
    "train chat.yaml --method full --output_dir fullout",
)


class Shop(Protocol):
    """What is needed of the workshop of `faults.py`."""

    folder: Path

    def call(
        self, words: list[str], in_background: bool, patch: Callable[[], None] | None = None
    ) -> tuple[int, str]: ...


class _Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


def poisons(canary: Path) -> dict[str, bytes]:
    """The same object as a bare pickle, in PyTorch's archive, and as an array of objects."""
    import numpy as np
    import torch

    command = _Command(f"touch {canary}")
    archive, array = io.BytesIO(), io.BytesIO()
    torch.save({"model.embed_tokens.weight": command}, archive)
    np.save(array, np.array([command], dtype=object), allow_pickle=True)
    bare = pickle.dumps({"model.embed_tokens.weight": command}, protocol=2)
    return {"bare": bare, "archive": archive.getvalue(), "array": array.getvalue()}


def check_poisons(canary: Path) -> None:
    """Loads each of them carelessly in a process of its own: a poison that does nothing would prove nothing."""
    import numpy as np
    import torch

    careless: dict[str, Callable[[io.BytesIO], object]] = {
        "bare": pickle.load,
        "archive": lambda stream: torch.load(stream, weights_only=False),
        "array": lambda stream: np.load(stream, allow_pickle=True),
    }
    for kind, content in poisons(canary).items():
        child = os.fork()
        if not child:
            careless[kind](io.BytesIO(content))
            os._exit(0)
        os.waitpid(child, 0)
        assert canary.exists(), f"{kind} does nothing"
        canary.unlink()


def put_beside(place: Path, canary: Path) -> int:
    """Puts every kind into every folder, beside what is there."""
    kinds, count = poisons(canary), 0
    folders = [path for path in [place, *place.rglob("*")] if path.is_dir()]
    for folder in folders:
        for number, name in enumerate(BESIDE):
            kind = "array" if ".np" in name else ("bare", "archive")[number % 2]
            if not (folder / name).exists():
                (folder / name).write_bytes(kinds[kind])
                count += 1
    return count


def put_instead(kind: str) -> Callable[[Path, Path], int]:
    """Puts a pickle in place of every file of weights, tokens and states, under its own name and PyTorch's."""

    def put(place: Path, canary: Path) -> int:
        content, count = poisons(canary)[kind], 0
        for path in [*place.rglob("*.safetensors"), *place.rglob("*.bin"), *place.rglob("*.parquet")]:
            path.write_bytes(content)
            if path.stem in ("model", "adapter_model"):
                path.unlink()
                path.with_name({"model": "pytorch_model.bin"}.get(path.stem, "adapter_model.bin")).write_bytes(content)
            count += 1
        # Without a manifest nothing tells that a checkpoint was changed.
        for name in (malformed_cases.LAST, malformed_cases.LAST_CHAT):
            shutil.copytree(place / name, place / "bare" / name)
            (place / "bare" / name / "manifest.json").unlink()
        return count

    return put


def put_code(place: Path, canary: Path) -> int:
    """Lets configs and tokenizers ask for code that lies beside them, as models of the Hub may."""
    count = 0
    for path in [*place.rglob("config.json"), *place.rglob("tokenizer_config.json")]:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["auto_map"] = {
            "AutoConfig": "evil.EvilConfig",
            "AutoModelForCausalLM": "evil.EvilModel",
            "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
        }
        document |= {"tokenizer_class": "EvilTokenizer"} if "tokenizer" in path.name else {"model_type": "evil"}
        path.write_text(json.dumps(document), encoding="utf-8")
        (path.parent / "evil.py").write_text(f"import os\nos.system('touch {canary}')\n", encoding="utf-8")
        count += 1
    (place / "data" / "data.py").write_text(f"import os\nos.system('touch {canary}')\n", encoding="utf-8")
    return count


def put_arrow(place: Path, canary: Path) -> int:
    """Writes Parquet files whose columns are of a type that older versions of Arrow unpickle."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": poisons(canary)["bare"],
    }
    count = 0
    for path in place.rglob("*.parquet"):
        table = pq.read_table(path)
        fields = [field.with_metadata(extension) for field in table.schema]
        pq.write_table(pa.table(table.columns, schema=pa.schema(fields)), path)
        count += 1
    return count


# How pickles are planted, and the commands that come across them.
WAYS: dict[str, tuple[Callable[[Path, Path], int], tuple[str, ...]]] = {
    "beside": (put_beside, VERBS),
    "instead, bare": (put_instead("bare"), _READ_WEIGHTS),
    "instead, archive": (put_instead("archive"), _READ_WEIGHTS),
    "instead, array": (put_instead("array"), _READ_WEIGHTS),
    "code": (put_code, _READ_CONFIGS),
    "arrow": (put_arrow, _READ_PARQUET),
}


def plant_pickle(shop: Shop, number: int, draw: random.Random) -> dict[str, Any]:
    """Plants pickles in one way wherever onecard reads, and uses all of its verbs there."""
    way = list(WAYS)[number % len(WAYS)]
    # Always the same place: runs know by whole paths where their text lies.
    place, made, canary = (shop.folder / name for name in ("planted", "planted-before", f"executed-{number}"))
    put, verbs = WAYS[way]
    check_poisons(canary)
    before, folder = dict(os.environ), Path.cwd()
    os.environ |= {name: str(place / name.lower()) for name in ("ONECARD_CACHE", "ONECARD_HOME", "HF_HOME")}
    try:
        if not made.exists():
            _make(shop, place)
            shutil.copytree(place, made)
        else:
            shutil.copytree(made, place)
        os.chdir(place)
        num_planted = put(place, canary)
        codes, problems = {}, []
        for words in [*verbs, *(f"chat bare/{name}" for name in _bare(place))]:
            code, errors = shop.call(words.split(), False, _answer_and_end)
            codes[words] = code
            problems += [f"a traceback of {words}: {errors[-300:]}"] if "Traceback" in errors else []
            if canary.exists():
                problems.append(f"loaded by {words}")
                canary.unlink()
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ |= before
    shutil.rmtree(place)
    return {"way": way, "planted": num_planted, "exit_codes": codes, "problems": problems}


def _make(shop: Shop, place: Path) -> None:
    """Makes the inputs of all commands: texts, recipes, a model, a run on text and one of an adapter."""
    place.mkdir()
    os.chdir(place)
    malformed_cases.write_inputs(place)
    (place / "answers.txt").write_text("y\n" * 40, encoding="utf-8")
    for words in malformed_cases.MADE_BY:
        code, errors = shop.call(words.split(), False)
        assert code == 0, f"{words}: {errors}"
    cached = place / "hf_home" / "hub" / "models--nobody--model"
    shutil.copytree(place / "base", cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123", encoding="utf-8")
    (place / "data").mkdir()
    shutil.copy(place / "text.txt", place / "data" / "text.txt")


def _bare(place: Path) -> list[str]:
    return [name for name in (malformed_cases.LAST, malformed_cases.LAST_CHAT) if (place / "bare" / name).is_dir()]


def _answer_and_end() -> None:
    """Answers every question with yes, and lets a server end before it listens."""
    from huggingface_hub import constants

    from onecard.handover import server

    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(Path("hf_home", "hub").absolute()), True
    os.dup2(os.open("answers.txt", os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    server.run_server = lambda *_: None
