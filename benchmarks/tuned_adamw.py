"""How soon the recipe of tiny Shakespeare is as good as tuned AdamW with a cosine schedule is at its end.

AdamW's rate is tuned on the first seed, on the recipe's own architecture and on the GPT-2 shape, for 2,000 steps of
12 x 64 characters. The recipe runs with schedules of several lengths; what counts is the shortest one that ends at
AdamW's loss or below. Precision and all else are the same. The loss is exact, over all non-overlapping blocks of 64 of
the last tenth of the text. Losses do not depend on what else a machine does, and may be looked for beside other work;
`--time` then times the steps of all three in turn, on a quiet machine, and tells the shares of time.

    python benchmarks/tuned_adamw.py path/to/tinyshakespeare.txt
    python benchmarks/tuned_adamw.py path/to/tinyshakespeare.txt --time
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from record import earlier_result, write_result
from shakespeare import BUDGET, GPT2, PLAIN

import onecard

NUM_STEPS = BUDGET["max_steps"]
_NUM_ROUNDS, _NUM_TIMED = 3, 200
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
LENGTHS = (400, 450, 600, 800, 1000)
_ADAMW = {"optim": "adamw", "adam_beta2": 0.99, "lr_scheduler_type": "cosine", "min_lr_ratio": 0.0, "warmup_steps": 100}
RECIPE = "shakespeare-char-cpu"
BASELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "same architecture": (RECIPE, {**_ADAMW, "weight_decay": 0.1}),
    "GPT-2 shape": ({**PLAIN, **GPT2}, {**_ADAMW, **BUDGET}),
}


class Runs:
    """Trains what has not been trained yet, and keeps every final loss."""

    def __init__(self, text: Path) -> None:
        self._text = text
        self.losses: dict[str, float] = earlier_result("tuned_adamw").get("losses", {})

    def loss(self, name: str, source: Any, settings: dict[str, Any]) -> float:
        """The held-out loss at the end."""
        if name not in self.losses:
            self.losses[name] = self.train(source, settings)[-1].loss
            print(f"{name}: {self.losses[name]:.4f}", flush=True)
            write_result("tuned_adamw", {"losses": self.losses})
        return self.losses[name]

    def train(self, source: Any, settings: dict[str, Any]) -> list[Any]:
        """The events of a run."""
        common = {"dataset": str(self._text), "report_to": "none", "sample_prompts": [], "save_steps": 0}
        recipe = onecard.load_recipe(source, **{**settings, **common, "eval_steps": 0})
        events: list[Any] = []
        with tempfile.TemporaryDirectory() as folder:
            onecard.train(recipe, output_dir=Path(folder) / "run", on_event=events.append)
        return events

    def tuned(self, name: str, rate: float, seed: int) -> float:
        """AdamW at a rate, over the whole budget."""
        source, settings = BASELINES[name]
        settings = {**settings, "learning_rate": rate, "seed": seed}
        return self.loss(f"{name}, AdamW {rate:g}, seed {seed}", source, settings)

    def recipe(self, num_steps: int, seed: int) -> float:
        """The recipe with a schedule of so many steps."""
        return self.loss(f"recipe, {num_steps} steps, seed {seed}", RECIPE, {"max_steps": num_steps, "seed": seed})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--time", action="store_true", help="time the steps of all three, and tell the shares of time")
    asked = parser.parse_args()
    runs = Runs(asked.text)
    rates, needed = find_steps(runs, asked.seeds)
    result: dict[str, Any] = {"losses": runs.losses, "rates": rates, "steps_needed": needed}
    print({"rates": rates, "steps needed": needed})
    if asked.time:
        step_s = time_steps(runs, rates)
        result |= {"step_s": step_s, "shares_of_time": shares_of(needed, step_s)}
        print({"seconds of a step": step_s, "shares of time": result["shares_of_time"]})
    write_result("tuned_adamw", result)


def find_steps(runs: Runs, seeds: list[int]) -> tuple[dict[str, float], dict[str, list[int | None]]]:
    """AdamW's best rate, and in each seed how many steps the recipe needs for its loss; None is more than all."""
    rates = {name: min((runs.tuned(name, rate, seeds[0]), rate) for rate in RATES)[1] for name in BASELINES}
    needed: dict[str, list[int | None]] = {name: [] for name in BASELINES}
    for seed in seeds:
        own = {num_steps: runs.recipe(num_steps, seed) for num_steps in LENGTHS}
        for name, rate in rates.items():
            loss = runs.tuned(name, rate, seed)
            needed[name].append(min((steps for steps, reached in own.items() if reached <= loss), default=None))
    return rates, needed


def time_steps(runs: Runs, rates: dict[str, float]) -> dict[str, list[float]]:
    """Median seconds of a step of each setting, in turn, some times."""
    settings = {name: (source, {**own, "learning_rate": rates[name]}) for name, (source, own) in BASELINES.items()}
    settings["recipe"] = (RECIPE, {})
    found: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(_NUM_ROUNDS):
        for name, (source, own) in settings.items():
            events = runs.train(source, {**own, "max_steps": _NUM_TIMED, "warmup_steps": 10})
            found[name].append(statistics.median(event.step_s for event in events if event.event == "step"))
    return found


def shares_of(needed: dict[str, list[int | None]], step_s: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """What share of AdamW's time the recipe needs, in each seed."""
    own_s = min(step_s["recipe"])
    return {
        name: [None if steps is None else steps * own_s / (NUM_STEPS * min(step_s[name])) for steps in of_seeds]
        for name, of_seeds in needed.items()
    }


if __name__ == "__main__":
    main()
