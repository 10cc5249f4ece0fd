"""What metrics, findings and guards cost: whole steps of a run beside bare updates of the same state, in turn.

    python benchmarks/observing.py                  # minutes; nothing else may run meanwhile
    python benchmarks/observing.py --hidden_size 64 --num_hidden_layers 2 --steps 500

One real run with all that watches it: record, TensorBoard, console, sensors, detectors, guards. After each of its steps
a bare one is made with the next batch of the same feed: place, train step, its loss read; nothing else. The two differ
by what is measured, and by the noise of the machine: so what the run does beside `train_step` is timed by itself, too.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from record import write_result

import onecard
from onecard.observe import ConsoleSink
from onecard.observe.events import Event
from onecard.run import loop
from onecard.training.step import place, train_step

_NUM_FIRST = 5


class Stopwatch:
    """Hears a run last of all; makes a bare step after each of its own, and times both.

    `computing_s` is what a step of the run spent on its batch and its update.
    """

    def __init__(self) -> None:
        self.state: Any = None
        self.feed: Any = None
        self.console: ConsoleSink | None = None
        self.whole_s: list[float] = []
        self.beside_s: list[float] = []
        self.bare_s: list[float] = []
        self.computing_s = 0.0
        self._left_s = time.perf_counter()

    def __call__(self, event: Event) -> None:
        if self.console is not None:
            self.console.receive(event)
        if event.event == "step":
            whole_s = time.perf_counter() - self._left_s
            self.whole_s.append(whole_s)
            self.beside_s.append(whole_s - self.computing_s)
            self.bare_s.append(self._make_bare_step())
        self.computing_s, self._left_s = 0.0, time.perf_counter()

    def _make_bare_step(self) -> float:
        begun_s, plan = time.perf_counter(), self.state.plan
        batches = [place(batch, self.state) for batch in next(self.feed)]
        stats = train_step(self.state, batches, 1e-4, max_grad_norm=plan.optimizer.max_grad_norm)
        torch.stack([stats.loss, stats.gradient_norm]).tolist()
        return time.perf_counter() - begun_s


def watched(watch: Stopwatch, patch: pytest.MonkeyPatch) -> None:
    """Lets the stopwatch see the state and the batches of the run, and how long its updates take."""
    make_loop, run, make_step = loop.Loop.__init__, loop.Loop.run, loop.Loop._step

    def init(self: Any, state: Any, *others: Any) -> None:
        watch.state = state
        make_loop(self, state, *others)

    def begin(self: Any, feed: Any) -> Iterator[Event]:
        watch.feed = feed
        return run(self, feed)

    def step(self: Any, feed: Any) -> Any:
        begun_s = time.perf_counter()
        made = make_step(self, feed)
        made.stats.loss.item()  # so that a GPU has done it
        watch.computing_s += time.perf_counter() - begun_s
        return made

    patch.setattr(loop.Loop, "__init__", init)
    patch.setattr(loop.Loop, "run", begin)
    patch.setattr(loop.Loop, "_step", step)


def measure(shape: dict[str, Any], num_steps: int) -> dict[str, Any]:
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        text = Path(folder) / "text.txt"
        text.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(60_000)))
        recipe = onecard.load_recipe(
            {
                "dataset": str(text),
                "tokenizer": "bytes",
                "max_seq_length": 128,
                "total_batch_size": 2,
                "max_steps": num_steps,
                "eval_steps": 0,
                "save_steps": 0,
                "save_minutes": None,
                "report_to": "tensorboard",
                "torch_compile": False,
            }
            | shape
        )
        watched(watch, patch)

        def show(plan: Any, _: Path) -> None:
            watch.console = ConsoleSink(plan, stream=io.StringIO())

        run = onecard.train(recipe, output_dir=Path(folder) / "run", on_event=watch, on_plan=show)
        parameters = json.loads((run / "plan.json").read_text(encoding="utf-8"))["model"]["num_parameters"]
        lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    if len(watch.whole_s) != num_steps:
        # A signal, such as that of a limit of time, ends a run in order, after any step.
        raise SystemExit(
            f"the run was stopped after {len(watch.whole_s)} of {num_steps} steps, which is no measurement"
        )
    whole, beside, bare = (times[_NUM_FIRST:] for times in (watch.whole_s, watch.beside_s, watch.bare_s))
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "parameters": parameters,
        "num_steps": len(whole),
        "num_readings": sum('"device"' in line[:40] for line in lines),
        "whole_step_s": statistics.median(whole),
        "bare_step_s": statistics.median(bare),
        "difference_share": paired(whole, bare, statistics.median) / statistics.median(bare),
        "difference_error": statistics.stdev(map(float.__sub__, whole, bare))
        / len(whole) ** 0.5
        / statistics.median(bare),
        "beside_step_s": statistics.fmean(beside),
        "beside_share": sum(beside) / sum(whole),
        "shortest_step_s_of_1_percent": 99 * statistics.fmean(beside),
    }


def paired(whole: list[float], bare: list[float], middle: Callable[..., float]) -> float:
    """The middle of the differences of neighbours, which share what the machine does besides."""
    return middle(a - b for a, b in zip(whole, bare, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_hidden_layers", type=int, default=6)
    parser.add_argument("--num_attention_heads", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150, help="of the run, and as many bare ones")
    given = vars(parser.parse_args())
    num_steps = given.pop("steps")
    result = measure(given, num_steps)
    print(json.dumps(result, indent=1))
    write_result("observing", result)
