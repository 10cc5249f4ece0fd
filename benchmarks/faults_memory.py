"""Memory that runs out and losses that are not finite, at random points of tiny runs on a CPU: what is lost?

Each run is a whole one, started by `onecard.train`, in which one fault is put: the operator that fails is drawn among
all that a forward and backward pass, an update, an evaluation, a sample or a save runs, or the step whose loss becomes
infinite among all steps. The runs end as the run without the fault does, or the fault is counted as lost or wrong.

    python benchmarks/faults_memory.py --count 40 --seed 1
"""

import argparse
import contextlib
import io
import json
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import write_result
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import onecard
from onecard.errors import OnecardError
from onecard.run import milestones, saver, stepping

MESSAGES = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
)
PLACES = ("step", "update", "evaluation", "samples", "save", "not finite", "not finite in a row")
NUM_STEPS = 12
RECIPE: dict[str, Any] = {
    "tokenizer": "bytes",
    "max_seq_length": 32,
    "model_config": {"model_type": "qwen3", "intermediate_size": 48},
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "adam_epsilon": 1e-4,  # above rounding, which Adam would make a full step of
    "per_device_train_batch_size": 4,
    "total_batch_size": 8,
    "max_steps": NUM_STEPS,
    "eval_steps": 4,
    "eval_batches": 2,
    "per_device_eval_batch_size": 4,
    "sample_steps": 6,
    "sample_prompts": ["the ", "a"],
    "sample_max_new_tokens": 4,
    "save_steps": 4,
    "precision": "fp32",
    "torch_compile": False,
    "device": "cpu",
    "report_to": "none",
}


class Fault(TorchDispatchMode):
    """Counts operators while something holds, and lets one of them fail as an allocator does."""

    def __init__(self, number: int | None, message: str, counts: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.num_seen = 0
        self._number = number
        self._message = message
        self._counts = counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._counts():
            self.num_seen += 1
            if self.num_seen == self._number:
                raise RuntimeError(self._message)
        return function(*args, **(kwargs or {}))


def run(seed: int, count: int) -> list[dict[str, Any]]:
    """Puts a fault into each of so many runs; a row per place: how many were lost, wrong, or showed a traceback."""
    draw = random.Random(seed)
    found: dict[str, list[str]] = {place: [] for place in PLACES}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        text = root / "text.txt"
        words = ("the", "a", "quick", "lazy", "fox", "dog", "over", "jumps", "and")
        text.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(600)), encoding="utf-8")
        wholes = [run_whole(root, text, optim) for optim in ("adamw", "muon")]
        for index in range(count):
            place = PLACES[index % len(PLACES)]
            found[place].append(try_one(root / f"run-{index}", text, place, draw, draw.choice(wholes)))
    return [
        {
            "fault": place if place.startswith("not") else f"out of memory: {place}",
            "runs": len(verdicts),
            **{verdict: verdicts.count(verdict) for verdict in ("right", "lost", "wrong", "traceback", "not met")},
        }
        for place, verdicts in found.items()
        if verdicts
    ]


def try_one(root: Path, text: Path, place: str, draw: random.Random, whole: "Whole") -> str:
    """Runs with one fault; says whether it ended as the whole run did."""
    met: list[bool] = []
    try:
        with replaced(place, faulty(place, draw, whole.num_operators.get(place, 2), met)):
            start(root, text, whole.optim)
    except OnecardError:
        return "lost"
    except Exception:
        traceback.print_exc()
        return "traceback"
    if not met:
        return "not met"
    return "right" if is_right(root, whole.root, place) else "wrong"


@dataclass(frozen=True)
class Whole:
    """A run without a fault, and the operators of a call at each place."""

    root: Path
    optim: str
    num_operators: dict[str, int]


def run_whole(root: Path, text: Path, optim: str) -> Whole:
    places = ("step", "update", "evaluation", "samples")
    counts = {place: count_operators(place, root / f"{optim}-{place}", text, optim) for place in places}
    return Whole(start(root / optim, text, optim), optim, counts)


def start(root: Path, text: Path, optim: str) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        return onecard.train(onecard.load_recipe(RECIPE | {"dataset": str(text), "optim": optim}), output_dir=root)


# Where a place is worked at, and how many calls of it a run makes.
SEAMS: dict[str, tuple[Any, str, int]] = {
    "step": (stepping, "train_step", NUM_STEPS),
    "update": (stepping, "train_step", NUM_STEPS),
    "not finite": (stepping, "train_step", NUM_STEPS),
    "not finite in a row": (stepping, "train_step", NUM_STEPS),
    "evaluation": (milestones, "measure_heldout_loss", 3),
    "samples": (milestones, "complete", 2),
    "save": (saver, "write_checkpoint", 3),
}


@contextlib.contextmanager
def replaced(place: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replaces the function that works at a place by what `make` makes of it."""
    module, name, _ = SEAMS[place]
    plain = getattr(module, name)
    setattr(module, name, make(plain))
    try:
        yield
    finally:
        setattr(module, name, plain)


def counts_of(place: str, args: Any) -> Callable[[], bool]:
    """What of a call belongs to a place: a step has an update at its end."""
    if place in ("step", "update"):
        return lambda: bool(args[0].is_updating) == (place == "update")
    return lambda: True


def count_operators(place: str, root: Path, text: Path, optim: str) -> int:
    """Counts the operators of the last call at a place of a whole run."""
    last = [0]

    def counting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            with Fault(None, "", counts_of(place, args)) as mode:
                result = plain(*args, **keywords)
            last[0] = mode.num_seen
            return result

        return call

    with replaced(place, counting):
        start(root, text, optim)
    return last[0]


def faulty(place: str, draw: random.Random, num_operators: int, met: list[bool]) -> Any:
    """Makes one call of a function fail, or its loss infinite; `met` is no longer empty once it has."""
    which, number, message = draw.randint(1, SEAMS[place][2]), draw.randint(1, num_operators), draw.choice(MESSAGES)
    calls = [0]

    def make(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            calls[0] += 1
            # In a row: five steps' worth of samples, at whatever step they come.
            is_bad = place == "not finite in a row" and 0 <= args[0].progress.position // 8 - min(which - 1, 7) < 5
            if calls[0] != which and not is_bad:
                return plain(*args, **keywords)
            if place.startswith("not finite"):
                met.append(True)
                args[0].loss_scale.value.fill_(float("inf"))
                try:
                    return plain(*args, **keywords)
                finally:
                    args[0].loss_scale.value.fill_(1.0)
            if place == "save":
                met.append(True)
                return plain(args[0], replace(args[1], write_files=out_of_memory_after(args[1].write_files, number)))
            with Fault(number, message, counts_of(place, args)) as fault:
                try:
                    return plain(*args, **keywords)
                finally:
                    met.extend([True] * (fault.num_seen >= number))

        return call

    return make


def out_of_memory_after(write_files: Callable[[Path], None], number: int) -> Callable[[Path], None]:
    """Lets memory run out before or after the model's files are written."""

    def write(folder: Path) -> None:
        if number % 2:
            write_files(folder)
        raise MemoryError

    return write


def is_right(root: Path, whole: Path, place: str) -> bool:
    """Whether a run ended with the weights and losses of the one without the fault, within rounding.

    A refused update is left out by design, so of those runs only the end and its finite weights are looked at.
    """
    runs = [read(root), read(whole)]
    (steps, tensors), (other_steps, other_tensors) = runs
    if len(steps) != len(other_steps) or not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        return False
    if place == "not finite in a row":
        return all(step["is_finite"] for step in steps) and "recovered" in (root / "events.jsonl").read_text("utf-8")
    if place == "not finite":
        return sum(not step["is_finite"] for step in steps) == 1
    return all(
        abs(one["loss"] - other["loss"]) <= 1e-4 * other["loss"] for one, other in zip(steps, other_steps, strict=True)
    ) and all(torch.allclose(tensors[name], tensor, rtol=0, atol=3e-4) for name, tensor in other_tensors.items())


def read(root: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    events = [json.loads(line) for line in (root / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = load_file(root / "checkpoints" / f"step-{NUM_STEPS:06d}" / "model.safetensors")
    return [event for event in events if event["event"] == "step"], weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows = run(arguments.seed, arguments.count)
    for row in rows:
        print(json.dumps(row))
    write_result("faults_memory", {"seed": arguments.seed, "rows": rows, "seconds": time.perf_counter() - started})


if __name__ == "__main__":
    main()
