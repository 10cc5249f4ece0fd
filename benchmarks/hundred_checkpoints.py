"""A hundred checkpoints of a tiny run, evaluated for loss: seconds on this machine's cores (target: 60 on two).

python benchmarks/hundred_checkpoints.py [FOLDER]
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import onecard

SETTINGS = {
    "dataset": "python-stdlib",
    "tokenizer": "bytes",
    "max_seq_length": 128,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "total_batch_size": 8,
    "max_steps": 100,
    "eval_steps": 0,
    "eval_batches": 4,
    "save_steps": 1,
    "save_total_limit": None,
    "precision": "fp32",
    "torch_compile": False,
    "device": "cpu",
    "report_to": "none",
}
NUM_BLOCKS = 32


def main(folder: Path) -> None:
    root = folder / "run"
    if not root.exists():
        onecard.train(onecard.load_recipe(SETTINGS), output_dir=root)
    started = time.perf_counter()
    found = onecard.evaluate(root, limit=NUM_BLOCKS)
    seconds = time.perf_counter() - started
    print(
        f"{len(found.checkpoints)} checkpoints x {NUM_BLOCKS} blocks of {SETTINGS['max_seq_length']}: {seconds:.1f} s, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, best {found.best['loss']}"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
