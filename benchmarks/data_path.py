"""What data costs: waiting while training, and memory over a small and a large corpus, in training and in preparing.

Runs: a whole `onecard.train` over a prepared corpus whose token file has 20 MB, and one over 2 GB. Both are prepared
from the same made-up text; then the token file is filled up with copies of itself and its manifest says so, because
tokenizing a gigabyte teaches nothing here. Preparing: a whole `onecard.prepare` of 20 MB and 200 MB of made-up text in
which, as in real text, more words turn up the longer it gets; once with a tokenizer that is there, once training one
(BPE counts words, in up to 256 MiB of text).

Each is a process of its own; anonymous memory (RssAnon, Linux) is read every 20 ms for its peak, and at the end.
Needs 3 GB in the temporary folder.

    python benchmarks/data_path.py              # or --only training, tokenizing, preparing; others are kept
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from record import earlier_result, write_result

SETTINGS: dict[str, Any] = {
    "name": "data-path",
    "tokenizer": "bpe",
    "vocab_size": 4096,
    "eval_fraction": 0.05,
    "model_config": {"model_type": "qwen3", "head_dim": 32},
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_seq_length": 256,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "torch_compile": False,
    "max_steps": 200,
    "eval_steps": 0,
    "save_steps": 0,
    "report_to": "none",
    "sample_prompts": [],
}
TRAINED_BYTES = {"20 MB": 20_000_000, "2 GB": 2_000_000_000}
PREPARED_BYTES = {"20 MB": 20_000_000, "200 MB": 200_000_000}
TEXT_BYTES = 4_000_000
LIMIT_BYTES = 200_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=("", "training", "tokenizing", "preparing"))
    parser.add_argument("--child", nargs=3, metavar=("ACTION", "TEXT", "BYTES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        action, text, size = arguments.child
        print(json.dumps(CHILDREN[action](text, int(size))))
        return
    result = earlier_result("data_path")
    for action, sizes in (("training", TRAINED_BYTES), ("tokenizing", PREPARED_BYTES), ("preparing", PREPARED_BYTES)):
        if arguments.only not in action:
            continue
        rows = result[action] = {}
        for name, size in sizes.items():
            rows[name] = run_alone(action, TEXT_BYTES if action == "training" else size, size)
            print(f"{action} {name}: {rows[name]}", flush=True)
        small, large = rows.values()
        growth = {key: large[key] - small[key] for key in ("peak_anonymous_bytes", "last_anonymous_bytes")}
        result[f"{action}_growth"] = growth
        print(f"{action}: peak grows by {growth['peak_anonymous_bytes'] / 1e6:.0f} MB (limit {LIMIT_BYTES / 1e6:.0f})")
        write_result("data_path", result)


def run_alone(action: str, text_bytes: int, size: int) -> dict[str, Any]:
    """One measurement in a process of its own, with a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, text_bytes)
        command = [sys.executable, __file__, "--child", action, str(text), str(size)]
        environment = {**os.environ, "ONECARD_CACHE": str(Path(folder) / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found.pop("tokenizer", None)  # a path that is gone
    return found


def write_text(file: Path, num_bytes: int) -> None:
    """Writes lines of made-up words with the frequencies of real ones (Zipf), in pieces."""
    generator = np.random.default_rng(0)
    written = 0
    with file.open("wb") as out:
        while written < num_bytes:
            words = [_word(rank) for rank in generator.zipf(1.4, 200_000).tolist()]
            lines = b"\n".join(b" ".join(words[start : start + 12]) for start in range(0, len(words), 12)) + b"\n"
            written += out.write(lines[: num_bytes - written])


@cache
def _word(rank: int) -> bytes:
    """A word of its own for each rank, of four letters or more."""
    spelled, rest = bytearray(), rank + 26**3
    while rest:
        rest, digit = divmod(rest, 26)
        spelled.append(ord("a") + digit)
    return bytes(spelled)


def measure_training(text: str, token_bytes: int) -> dict[str, float]:
    """Waiting as a share of step time and anonymous memory of a whole `onecard.train`."""
    import torch

    import onecard

    recipe = onecard.load_recipe({**SETTINGS, "dataset": text})
    fill_up(onecard.prepare(recipe).train[0].path, token_bytes)
    steps: list[Any] = []
    with watched_memory() as memory, tempfile.TemporaryDirectory() as folder:
        onecard.train(
            recipe,
            output_dir=Path(folder) / "run",
            on_event=lambda event: steps.append(event) if event.event == "step" else None,
        )
        tokens = onecard.prepare(recipe).num_train_tokens
    return {
        **memory,
        "num_train_tokens": tokens,
        "num_steps": len(steps),
        "num_threads": torch.get_num_threads(),
        "waiting_share": sum(step.wait_s for step in steps) / sum(step.step_s for step in steps),
        "longest_wait_s": max(step.wait_s for step in steps),
        "steps_s": sum(step.step_s for step in steps),
    }


def fill_up(tokens: Path, num_bytes: int) -> None:
    """Lengthens a prepared token file by copies of itself, and its manifest with it."""
    from onecard.data.token_file import Manifest

    manifest = Manifest.read(tokens.parent)
    # A mapped file is replaced, not written to, as `prepare` does it.
    beside = tokens.with_suffix(".partial")
    with beside.open("wb") as out:
        while (missing := num_bytes - out.tell()) > 0:
            with tokens.open("rb") as piece:
                shutil.copyfileobj(piece, out) if missing > tokens.stat().st_size else out.write(piece.read(missing))
    beside.replace(tokens)
    num_tokens = num_bytes // np.dtype(manifest.dtype).itemsize
    train = dataclasses.replace(manifest.train, tokens=num_tokens)
    dataclasses.replace(manifest, train=train).write(tokens.parent)


def measure_tokenizing(text: str, _: int) -> dict[str, float]:
    """Anonymous memory of `onecard.prepare` with a tokenizer that another process has trained."""
    sample = Path(text).with_name("sample.txt")
    write_text(sample, TEXT_BYTES)
    command = [sys.executable, __file__, "--child", "preparing", str(sample), "0"]
    trained = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return measure_preparing(text, 0, tokenizer=trained["tokenizer"], vocab_size=None)


def measure_preparing(text: str, _: int, **settings: Any) -> dict[str, Any]:
    """Anonymous memory of a whole `onecard.prepare`."""
    import onecard

    recipe = onecard.load_recipe({**SETTINGS, **settings, "dataset": text})
    with watched_memory() as memory:
        corpus = onecard.prepare(recipe)
    tokens = {"num_train_tokens": corpus.num_train_tokens}
    return {**memory, **tokens, "tokenizer": str(corpus.tokenizer_folder)}


@contextmanager
def watched_memory() -> Iterator[dict[str, float]]:
    """Fills in the peak of anonymous memory while the block runs, and its last value."""
    found: dict[str, float] = {"peak_anonymous_bytes": 0}
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            found["peak_anonymous_bytes"] = max(found["peak_anonymous_bytes"], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        found["last_anonymous_bytes"] = anonymous_bytes()
        is_over.set()
        thread.join()


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("RssAnon is not in /proc/self/status")


CHILDREN = {"training": measure_training, "tokenizing": measure_tokenizing, "preparing": measure_preparing}

if __name__ == "__main__":
    main()
