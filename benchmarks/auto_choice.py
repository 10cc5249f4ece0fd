"""Is what `auto` chooses the fastest? Four settings, eight candidates each, measured side by side on this device.

    python benchmarks/auto_choice.py               # minutes on a CPU and on a GPU; broken off, it goes on
    python benchmarks/auto_choice.py --rounds 9

Candidates are micro-batches of the same effective batch, with and without activation checkpointing; one that runs
out of memory is left out. All steps of a setting are whole, on random tokens, and take turns round by round, every
second one backwards; a candidate's time is its median. The share is the best candidate's time over that of the one
which `auto` chose; `quarters` are the first and third quartile of each, to judge it by.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from record import earlier_result, write_result

from onecard import api
from onecard.data import Batch
from onecard.planner.measure import synchronize
from onecard.spec import Plan
from onecard.training.assemble import assemble
from onecard.training.state import TrainState
from onecard.training.step import place, train_step

_TOTAL = 32
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_RESULT = "auto_choice" if _DEVICE == "cuda" else "auto_choice_cpu"
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


class Steps:
    """Whole steps of a plan, of any micro-batch, on weights that all of them share."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._states: dict[bool, TrainState] = {}
        generator = torch.Generator().manual_seed(0)
        shape = (plan.total_batch_size, plan.max_seq_length + 1)
        self._ids = torch.randint(plan.corpus.vocab_size, shape, generator=generator)

    def time(self, size: int, recomputes: bool) -> float:
        """Seconds of one update."""
        if recomputes not in self._states:
            self._states[recomputes] = assemble(
                self._plan.model_copy(update={"micro_batch_size": size, "gradient_checkpointing": recomputes})
            )
        state = self._states[recomputes]
        batches = [
            place(Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None, part[:, 1:].numel()), state)
            for part in self._ids.split(size)
        ]
        synchronize(self._plan.device)
        started = time.perf_counter()
        train_step(state, batches, 1e-4, max_grad_norm=1.0)
        synchronize(self._plan.device)
        return time.perf_counter() - started


def measure(changes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds a step of every candidate, and the share of the best that `auto` reaches."""
    plan = api.plan(api.load_recipe({**_COMMON, **changes}))
    chosen = (plan.micro_batch_size, bool(plan.gradient_checkpointing))
    steps, times = Steps(plan), dict[tuple[int, bool], list[float]]()
    for candidate in dict.fromkeys([*_CANDIDATES, chosen]):
        try:
            steps.time(*candidate)
            times[candidate] = []
        except torch.OutOfMemoryError:
            print(f"  {_name(*candidate)} does not fit")
    for number in range(rounds):
        for candidate in list(times)[:: -1 if number % 2 else 1]:
            times[candidate].append(steps.time(*candidate))
    seconds = {candidate: statistics.median(values) for candidate, values in times.items()}
    return {
        "chosen": _name(*chosen),
        "reason": plan.reasons.get("micro_batch_size"),
        "step_s": {_name(*candidate): value for candidate, value in seconds.items()},
        "quarters": {_name(*candidate): statistics.quantiles(values)[::2] for candidate, values in times.items()},
        "rounds": rounds,
        "share_of_best": min(seconds.values()) / seconds[chosen],
    }


def _name(size: int, recomputes: bool) -> str:
    return f"{size}, recomputed" if recomputes else str(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    result = earlier_result(_RESULT)
    for name, changes in _SETTINGS[_DEVICE].items():
        if name in result:
            continue
        print(name, flush=True)
        row = result[name] = measure(changes, arguments.rounds)
        told = ", ".join(f"{candidate}: {seconds:.3f}" for candidate, seconds in row["step_s"].items())
        print(
            f"  seconds a step {told}\n  auto takes {row['chosen']}: {row['share_of_best']:.0%} of the best", flush=True
        )
        write_result(_RESULT, result)


if __name__ == "__main__":
    main()
