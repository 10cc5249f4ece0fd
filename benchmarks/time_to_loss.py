"""How soon a held-out loss of 1.88 is reached on tiny Shakespeare, against nanoGPT's CPU setting with AdamW at 1e-3.

All train in this process, in turn, with the same code. Time counts training steps only, not the evaluations that look
for the moment. The recipe is `shakespeare-char-cpu` with `--size quick`, a schedule that ends below 1.88. The baseline
runs in fp32, as published, and, with `--baselines fp32 auto`, once more in what onecard would choose on this machine.
It ends above 1.88, so a ratio is a lower bound. `--sizes quick full` times the recipe's own long schedule as well,
which passes 1.88 on its way to a lower loss. Rounds of other seeds with the same source are kept in the result.

    python benchmarks/time_to_loss.py path/to/tinyshakespeare.txt --seeds 1337 1338 1339
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from record import earlier_result, write_result
from shakespeare import BUDGET, GPT2, PLAIN

import onecard

TARGET = 1.88
BASELINE = {**PLAIN, **GPT2, "learning_rate": 1e-3, "min_lr_ratio": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--baselines", nargs="+", default=["fp32"], choices=("fp32", "auto"))
    parser.add_argument("--sizes", nargs="+", default=["quick"], choices=("quick", "full"))
    arguments = parser.parse_args()
    rounds = {entry["seed"]: entry for entry in earlier_result("time_to_loss").get("rounds", [])}
    for seed in arguments.seeds:
        entry: dict[str, Any] = {"seed": seed, "ratios": {}}
        for precision in arguments.baselines:
            settings = {"seed": seed, "eval_steps": 250, "precision": precision}
            entry[f"baseline_{precision}"] = time_to_target(BASELINE, arguments.text, settings)
        for size in arguments.sizes:
            settings = {"seed": seed, "eval_steps": 20, **({} if size == "full" else {"size": size})}
            entry[size] = time_to_target("shakespeare-char-cpu", arguments.text, settings)
            for precision in arguments.baselines:
                ratio = entry[f"baseline_{precision}"]["seconds"] / entry[size]["seconds"]
                entry["ratios"][f"{precision} / {size}"] = ratio
        rounds[seed] = entry
        print(f"seed {seed}: the baseline takes as many times as long: {entry['ratios']}")
        write_result("time_to_loss", {"target": TARGET, "rounds": [*rounds.values()], "ratios": spreads(rounds)})


def spreads(rounds: dict[int, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest ratio by precision of the baseline and size of the recipe."""
    found: dict[str, list[float]] = {}
    for entry in rounds.values():
        for pair, ratio in entry["ratios"].items():
            found.setdefault(pair, []).append(ratio)
    return {
        pair: {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        for pair, ratios in found.items()
    }


def time_to_target(source: Any, text: Path, overrides: dict[str, Any]) -> dict[str, float]:
    """Seconds of training steps until the held-out loss is at most the target, and of the whole schedule."""
    common = {"dataset": str(text), "report_to": "none", "sample_prompts": [], "save_steps": 0}
    budget = BUDGET if isinstance(source, dict) else {}
    recipe = onecard.load_recipe(source, **{**budget, **overrides, **common})
    seconds, reached, losses = 0.0, None, []

    def watch(event: Any) -> None:
        nonlocal seconds, reached
        if event.event == "step":
            seconds += event.step_s
        elif event.event == "evaluated":
            losses.append((event.step, round(event.loss, 4)))
            if reached is None and event.loss <= TARGET:
                reached = (event.step, seconds)

    with tempfile.TemporaryDirectory() as folder:
        onecard.train(recipe, output_dir=Path(folder) / "run", on_event=watch)
    # A run that ends above the target took at least its whole schedule.
    step, needed = reached or (losses[-1][0], seconds)
    return {"is_reached": reached is not None, "step": step, "seconds": needed, "final_loss": losses[-1][1]}


if __name__ == "__main__":
    main()
