"""How long many chats take to become token files with targets, and in how much memory.

Synthetic conversations of two turns and about 60 tokens are written, then prepared in a process of their own for each
number of rows, with an empty cache. Memory is the process's peak of anonymous pages.

    python benchmarks/chat_preparation.py path/to/tokenizer --rows 100000 1000000
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from record import write_result

_WORDS = [first + second for first in "bdkmrstlp" for second in ("an", "ell", "ik", "or", "ude", "est", "im")]
_WATCH_INTERVAL_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="folder of a tokenizer, for example GPT-2's")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(prepare(arguments.child, arguments.tokenizer)))
        return
    result = []
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = write_chats(Path(folder) / "chats.jsonl", num_rows)
            command = [sys.executable, __file__, arguments.tokenizer, "--child", str(file)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        entry = {"num_rows": num_rows, **json.loads(done.stdout)}
        print(f"{num_rows:,} rows: {entry['seconds']:.0f} s, {entry['peak_bytes'] / 2**20:.0f} MiB", file=sys.stderr)
        result.append(entry)
    write_result("chat_preparation", result)


def write_chats(file: Path, num_rows: int) -> Path:
    """Writes conversations of random words."""
    generator = random.Random(1)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(num_rows):
            question, answer = (" ".join(generator.choices(_WORDS, k=count)) for count in (10, 15))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return file


def prepare(file: Path, tokenizer: str) -> dict[str, float]:
    """Prepares a file of chats in this process."""
    from onecard.data import ChatRequest, Source, prepare_chats

    peaks = [0]
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peaks, stop))
    watcher.start()
    request = ChatRequest((Source(str(file)),), tokenizer, cache_dir=file.parent / "cache")
    started = time.perf_counter()
    corpus = prepare_chats(request)
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    num_tokens = corpus.num_train_tokens + corpus.num_heldout_tokens
    return {"seconds": seconds, "peak_bytes": max(peaks), "num_tokens": num_tokens}


def _watch(peaks: list[int], stop: threading.Event) -> None:
    while not stop.wait(_WATCH_INTERVAL_S):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                peaks[0] = max(peaks[0], int(line.split()[1]) * 1024)


if __name__ == "__main__":
    main()
