"""Is what `auto` chooses the fastest? Four settings, eight candidates each, measured side by side on this device.

    python benchmarks/auto_choice.py               # minutes on a CPU and on a GPU
    python benchmarks/auto_choice.py --rounds 5

Candidates are micro-batches of the same effective batch, with and without activation checkpointing; one that runs
out of memory is left out. All steps of a setting are whole, on random tokens, and alternate round by
round; a candidate's time is its median. The share is the best candidate's time over that of what `auto` chose.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from record import write_result

from onecard import api
from onecard.data import Batch
from onecard.planner.measure import synchronize
from onecard.spec import Plan
from onecard.training.assemble import assemble
from onecard.training.step import place, train_step

_TOTAL = 32
# Micro-batch, and whether layers recompute.
_CANDIDATES = [*((size, False) for size in (1, 2, 4, 8, 16, 32)), (8, True), (32, True)]


def _shape(family: str, layers: int, width: int, length: int, **others: Any) -> dict[str, Any]:
    heads = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
    return {"model_config": {"model_type": family}, **heads, "max_seq_length": length, **others}


_SETTINGS = {
    "cpu": {
        "qwen3 3 x 128, length 128": _shape("qwen3", 3, 128, 128),
        "gpt2 4 x 256, length 64": _shape("gpt2", 4, 256, 64),
        "llama 4 x 256, length 256, AdamW": _shape("llama", 4, 256, 256, optim="adamw"),
        "llama 2 x 256, length 128, fp32": _shape("llama", 2, 256, 128, precision="fp32"),
    },
    "cuda": {
        "qwen3 12 x 768, length 1024": _shape("qwen3", 12, 768, 1024),
        "gpt2 12 x 768, length 512": _shape("gpt2", 12, 768, 512),
        "llama 16 x 1024, length 1024, AdamW": _shape("llama", 16, 1024, 1024, optim="adamw"),
        "llama 12 x 768, length 2048, at most 8 GB": _shape("llama", 12, 768, 2048, memory_limit_gb=8),
    },
}
_COMMON = {
    "dataset": "python-stdlib",
    "tokenizer": "bytes",
    "total_batch_size": _TOTAL,
    "max_steps": 1000,
    "sample_prompts": [],
    "torch_compile": False,
}


class Runner:
    """A plan and what it takes to run whole steps of it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.times: list[float] = []
        self._state = assemble(plan)
        generator = torch.Generator().manual_seed(0)
        shape = (plan.total_batch_size, plan.max_seq_length + 1)
        ids = torch.randint(plan.corpus.vocab_size, shape, generator=generator)
        self._batches = [
            place(Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None, part[:, 1:].numel()), self._state)
            for part in ids.split(plan.micro_batch_size)
        ]

    def step(self, *, is_timed: bool = True) -> None:
        """Makes one update."""
        synchronize(self.plan.device)
        started = time.perf_counter()
        train_step(self._state, self._batches, 1e-4, max_grad_norm=1.0)
        synchronize(self.plan.device)
        if is_timed:
            self.times.append(time.perf_counter() - started)


def measure(changes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds a step of every candidate, and the share of the best that `auto` reaches."""
    chosen = api.plan(api.load_recipe({**_COMMON, **changes}))
    runners = {"auto": Runner(chosen)}
    for size, recomputes in _CANDIDATES:
        name = f"{size}, recomputed" if recomputes else str(size)
        update = {"micro_batch_size": size, "gradient_checkpointing": recomputes}
        try:
            runners[name] = Runner(chosen.model_copy(update=update))
            runners[name].step(is_timed=False)
        except torch.OutOfMemoryError:
            del runners[name]
            print(f"  {name} does not fit")
    for number in range(rounds + 1):
        for runner in runners.values():
            runner.step(is_timed=number > 0)
    seconds = {name: statistics.median(runner.times) for name, runner in runners.items()}
    best = min(value for name, value in seconds.items() if name != "auto")
    return {
        "chosen": {"micro_batch_size": chosen.micro_batch_size, "recomputed": chosen.gradient_checkpointing},
        "step_s": seconds,
        "share_of_best": best / seconds["auto"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    for name, changes in _SETTINGS["cuda" if torch.cuda.is_available() else "cpu"].items():
        print(name, flush=True)
        row = result[name] = measure(changes, arguments.rounds)
        told = ", ".join(f"{candidate}: {seconds:.3f}" for candidate, seconds in row["step_s"].items())
        print(f"  seconds a step {told}\n  auto reaches {row['share_of_best']:.0%} of the best", flush=True)
    write_result("auto_choice", result)


if __name__ == "__main__":
    main()
