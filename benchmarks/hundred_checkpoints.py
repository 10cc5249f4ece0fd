"""A hundred checkpoints of a tiny run, evaluated for loss on all held-out text: seconds here (target: 60 on two cores).

python benchmarks/hundred_checkpoints.py [FOLDER]
"""

import ast
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import write_result

import onecard

SETTINGS = {
    "tokenizer": "bytes",
    "max_seq_length": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "per_device_train_batch_size": 8,
    "total_batch_size": 8,
    "max_steps": 100,
    "eval_steps": 100,
    "save_steps": 1,
    "save_total_limit": None,
    "precision": "fp32",
    "torch_compile": False,
    "device": "cpu",
    "report_to": "none",
}
NUM_TEXT_BYTES = 256 * 1024
TARGET_S = 60


def main(folder: Path) -> None:
    root, started = folder / "run", time.perf_counter()
    if not root.exists():
        (folder / "text.txt").write_text(_own_text(), encoding="utf-8")
        onecard.train(onecard.load_recipe({**SETTINGS, "dataset": str(folder / "text.txt")}), output_dir=root)
        print(f"training with a save after each step: {time.perf_counter() - started:.1f} s")
    load, started, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    found = onecard.evaluate(root)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    result = {
        "num_checkpoints": len(found.checkpoints),
        "num_target_tokens": found.checkpoints[0].find("loss").n,
        "seconds": round(seconds, 1),
        "target_seconds": TARGET_S,
        "cpu_seconds": round(cpu_s, 1),
        "num_threads": torch.get_num_threads(),
        "load_before": round(load, 1),
        "first_loss": found.checkpoints[0].find("loss").value,
        "last_loss": found.checkpoints[-1].find("loss").value,
        "best": found.best["loss"],
    }
    print(json.dumps(result, indent=1))
    write_result("hundred_checkpoints", result)


def _own_text() -> str:
    """The first modules of the standard library by name: the same text wherever this Python runs."""
    files = sorted(Path(ast.__file__).parent.glob("*.py"))
    return "".join(file.read_text(encoding="utf-8") for file in files)[:NUM_TEXT_BYTES]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
