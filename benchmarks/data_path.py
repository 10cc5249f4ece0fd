"""What data costs while training: waiting as a share of step time, and memory over a small and a large token file.

Token files of 20 MB and 2 GB are made of random tokens in a temporary folder (needs 2.1 GB of disk). Anonymous memory
(RssAnon) is read at the end of a run of each, in a process of its own.

    python benchmarks/data_path.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from record import write_result

SIZES_BYTES = {"20 MB": 20_000_000, "2 GB": 2_000_000_000}
LIMIT_BYTES = 200_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("FILE", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(train_over(Path(arguments.child[0]), int(arguments.child[1]))))
        return
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES_BYTES.items():
            file = Path(folder) / "tokens.bin"
            write_tokens(file, size)
            command = [sys.executable, __file__, "--child", str(file), "150"]
            result[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(name, result[name])
    growth = result["2 GB"]["anonymous_bytes"] - result["20 MB"]["anonymous_bytes"]
    print(f"anonymous memory grows by {growth / 1e6:.0f} MB (limit {LIMIT_BYTES / 1e6:.0f} MB)")
    write_result("data_path", {**result, "growth_bytes": growth})


def write_tokens(file: Path, num_bytes: int) -> None:
    """Writes random 16-bit tokens in pieces, so that this process stays small."""
    generator = np.random.default_rng(0)
    with file.open("wb") as out:
        for start in range(0, num_bytes, 20_000_000):
            count = min(20_000_000, num_bytes - start) // 2
            generator.integers(1, 4096, count, dtype=np.uint16).tofile(out)


def train_over(file: Path, num_steps: int) -> dict[str, float]:
    """Trains a small model on blocks from all over the file; gives memory and waiting."""
    import time

    from onecard.data import BatchStream, BlockSampler, StreamSettings
    from onecard.data.token_file import TokenFile
    from onecard.hardware import probe_machine
    from onecard.planner import Measurements, make_plan
    from onecard.spec import CorpusFacts
    from onecard.spec.load import load_recipe
    from onecard.training.assemble import assemble
    from onecard.training.step import place, train_step

    tokens = TokenFile(file, "<u2", file.stat().st_size // 2)
    facts = CorpusFacts(
        vocab_size=4096,
        num_train_tokens=tokens.num_tokens,
        num_heldout_tokens=0,
        train_bytes=1,
        heldout_bytes=0,
        separator_id=0,
        fingerprint="",
    )
    recipe = load_recipe("shakespeare-char-cpu", max_seq_length=256, per_device_train_batch_size=8, dataset=str(file))
    plan = make_plan(recipe, probe_machine(), facts, Measurements(peak=lambda device, precision: 1e12))
    state = assemble(plan)
    sampler = BlockSampler([tokens.num_tokens], [1.0], plan.max_seq_length, plan.seed)
    settings = StreamSettings(plan.total_batch_size, plan.micro_batch_size, plan.dataloader_num_workers, 4)
    waiting, started = 0.0, time.perf_counter()
    with BatchStream([tokens], sampler, 0, settings) as stream:
        for _ in range(num_steps):
            micro_batches = [place(batch, state) for batch in next(stream)]
            waiting += stream.wait_s
            train_step(state, micro_batches, 1e-3, max_grad_norm=1.0)
    seconds = time.perf_counter() - started
    return {"anonymous_bytes": anonymous_bytes(), "waiting_share": waiting / seconds, "seconds": seconds}


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("RssAnon is not in /proc/self/status")


if __name__ == "__main__":
    main()
