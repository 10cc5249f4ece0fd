"""What checkpoints cost while training goes on: time that stood still, and steps that were slower meanwhile.

    python benchmarks/saving.py [--minutes 3] [--every 0.5]

One run that saves so often, on the CPU or the GPU that is there. The share is (waits + what steps took longer while a
checkpoint was being written than the median of the others) of the time of the run. A state so small that it is written
at once says nothing about that, and is refused.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import write_result

import onecard


def measure(minutes: float, every: float, hidden_size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = onecard.load_recipe(
            {
                "dataset": "python-stdlib",
                "tokenizer": "bytes",
                "max_seq_length": 128,
                "model_config": {"model_type": "qwen3", "intermediate_size": 3 * hidden_size},
                "hidden_size": hidden_size,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "max_hours": minutes / 60,
                "total_batch_size": 8,
                "save_minutes": every,
                "save_steps": 0,
                "eval_steps": 0,
                "report_to": "none",
                "torch_compile": False,
            }
        )
        run = onecard.train(recipe, output_dir=Path(folder) / "run")
        events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    saves = [event for event in events if event["event"] == "saved" and event["reason"] == "clock"]
    if any(save["wait_s"] >= save["seconds"] for save in saves):
        raise SystemExit(
            f"checkpoints of {saves[0]['num_bytes']:,} bytes were written while training stood still, which tells "
            f"nothing of writing beside it: give more than --hidden_size {hidden_size}"
        )
    steps = [event for event in events if event["event"] == "step"][5:]
    spans = [(save["elapsed_s"], save["elapsed_s"] + save["seconds"]) for save in saves]
    beside = [any(a < step["elapsed_s"] <= b + step["step_s"] for a, b in spans) for step in steps]
    during = [step["step_s"] for step, is_beside in zip(steps, beside, strict=True) if is_beside]
    others = [step["step_s"] for step, is_beside in zip(steps, beside, strict=True) if not is_beside]
    total_s, median_s = steps[-1]["elapsed_s"] - steps[0]["elapsed_s"], statistics.median(others)
    waits_s = sum(save["wait_s"] for save in saves)
    slower_s = sum(during) - len(during) * median_s
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "checkpoint_bytes": saves[0]["num_bytes"],
        "saves": len(saves),
        "seconds_between": total_s / len(saves),
        "write_s": statistics.median(save["seconds"] for save in saves),
        "wait_s": statistics.median(save["wait_s"] for save in saves),
        "waits_share": waits_s / total_s,
        "slower_steps_share": slower_s / total_s,
        "share": (waits_s + slower_s) / total_s,
        "median_step_s": median_s,
        "num_steps": len(steps),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--every", type=float, default=0.5, help="minutes between checkpoints")
    parser.add_argument("--hidden_size", type=int, default=512)
    given = parser.parse_args()
    result = measure(given.minutes, given.every, given.hidden_size)
    print(json.dumps(result, indent=1))
    write_result("saving", result)
