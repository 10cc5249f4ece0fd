"""Two processes of one core each beside one process of one core, and how much of what they tell each other is hidden.

    python benchmarks/ranks_speed.py [--num_steps 8] [--samples 32] [--precisions fp32,bf16] [--rounds 2]

gpt2 of 11M parameters, 256 tokens a sample, gloo on this machine. The effective batch is the same on one process and on
two. Overlap is the part of the time in which gloo sums gradients while the backward pass computes on, in a profile of
the last step of rank 0, after those whose speed counts. Linux only: each process is bound to a core.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if "--work" in sys.argv:  # before PyTorch counts its cores
    os.sched_setaffinity(0, {int(os.environ.get("LOCAL_RANK", "0"))})

import torch
from record import write_result

import onecard
from onecard.distributed.place import find_place
from onecard.observe.events import Event, StepEvent
from onecard.planner import measure as planner_measure

Span = tuple[float, float]
_FIRST_STEADY, _NUM_PROFILED = 3, 1
_RECIPE: dict[str, Any] = {
    "dataset": "python-stdlib",
    "tokenizer": "bytes",
    "max_seq_length": 256,
    "model_config": {"model_type": "gpt2", "n_layer": 6, "n_head": 6, "n_embd": 384},
    "dropout": 0.0,
    "per_device_train_batch_size": 8,
    "device": "cpu",
    "torch_compile": False,
    "optim": "adamw",
    "eval_steps": 0,
    "eval_batches": 1,
    "save_steps": 0,
    "save_minutes": None,
    "report_to": "none",
}


def work(listed: Path) -> None:
    """What each process does: trains, and where it leads writes down speeds and what overlapped."""
    planner_measure._PEAK_SIZE["cpu"] = 64  # the forecast is not what is measured here
    job = json.loads(listed.read_text(encoding="utf-8"))
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    speeds: list[float] = []

    def hear(event: Event) -> None:
        if not isinstance(event, StepEvent):
            return
        last = job["recipe"]["max_steps"]
        if _FIRST_STEADY <= event.step <= last - _NUM_PROFILED:
            speeds.append(event.tokens_per_s)
        if job["is_profiled"] and event.step == last - _NUM_PROFILED:
            profiler.start()
        if job["is_profiled"] and event.step == last:
            profiler.stop()

    onecard.train(onecard.load_recipe(job["recipe"]), output_dir=job["root"], on_event=hear)
    if find_place().is_leader:
        found = {"tokens_per_s": statistics.median(speeds)}
        if job["is_profiled"]:
            found |= overlap_of(profiler)
        Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


def overlap_of(profiler: Any) -> dict[str, float]:
    """Seconds of summing, of backward passes, and the share of the first that lies in the second."""
    sums, passes = list[Span](), list[Span]()
    for event in profiler.events():
        span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        if "all_reduce" in event.name or "allreduce" in event.name:
            sums.append(span)
        elif event.name.startswith("autograd::engine::evaluate_function"):
            passes.append(span)
    summing, computing = join(sums), join(passes)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in summing for b in computing)
    total = sum(end - begin for begin, end in summing)
    return {
        "summing_s": total,
        "backward_s": sum(end - begin for begin, end in computing),
        "num_sums": len(sums),
        "overlap_share": both / total if total else 0.0,
    }


def join(spans: list[Span]) -> list[Span]:
    """Spans that touch become one."""
    joined = list[Span]()
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def measure(folder: Path, recipe: dict[str, Any], num: int) -> dict[str, float]:
    """Trains on so many processes; gives what the leader wrote down."""
    name = f"{num}-{len(list(folder.iterdir()))}"
    job = {"recipe": recipe, "root": str(folder / name), "result": str(folder / f"{name}.result")}
    listed = folder / f"{name}.json"
    listed.write_text(json.dumps(job | {"is_profiled": num > 1}), encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num}"] if num > 1 else []
    command = [sys.executable, *torchrun, __file__, "--work", str(listed)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found: dict[str, float] = json.loads(Path(job["result"]).read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_steps", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="of a process that was started")
    asked = parser.parse_args()
    if asked.work is not None:
        work(asked.work)
        return
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        for precision in asked.precisions.split(","):
            recipe = _RECIPE | {
                "precision": precision,
                "max_steps": asked.num_steps,
                "total_batch_size": asked.samples,
            }
            speeds: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(asked.rounds):
                for num, of_num in speeds.items():
                    profile = measure(Path(place), recipe, num)
                    of_num.append(profile.pop("tokens_per_s"))
                    print(precision, speeds, profile, flush=True)
            row = {f"{num} processes": [round(speed) for speed in of_num] for num, of_num in speeds.items()}
            ratio = max(speeds[2]) / max(speeds[1])
            rows[precision] = {**row, "ratio": round(ratio, 2), "profile": profile}
            print(precision, rows[precision], flush=True)
    settings = {"num_steps": asked.num_steps, "samples": asked.samples, "tokens_per_sample": 256}
    write_result("ranks_speed", {**settings, "rows": rows})


if __name__ == "__main__":
    main()
