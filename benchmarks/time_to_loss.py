"""How soon a held-out loss of 1.88 is reached on tiny Shakespeare, against nanoGPT's CPU setting with AdamW at 1e-3.

All train in this process, in turn, with the same code. Time counts training steps only, not the evaluations that look
for the moment. The recipe is `shakespeare-char-cpu` with `--size quick`, a schedule that ends just below 1.88. The
baseline runs in fp32, as published, and once more in what onecard would choose on this machine.

    python benchmarks/time_to_loss.py path/to/tinyshakespeare.txt
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from record import write_result
from shakespeare import BUDGET, GPT2, PLAIN

import onecard

TARGET = 1.88
BASELINE = {**PLAIN, **GPT2, "learning_rate": 1e-3, "min_lr_ratio": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rounds = []
    for seed in range(1337, 1337 + arguments.repeats):
        fp32, auto = (
            time_to_target(BASELINE, arguments.text, {"seed": seed, "eval_steps": 250, "precision": precision})
            for precision in ("fp32", "auto")
        )
        quick = time_to_target(
            "shakespeare-char-cpu", arguments.text, {"size": "quick", "seed": seed, "eval_steps": 10}
        )
        ratios = {name: run["seconds"] / quick["seconds"] for name, run in (("fp32", fp32), ("auto", auto))}
        rounds.append({"seed": seed, "baseline_fp32": fp32, "baseline_auto": auto, "quick": quick, "ratios": ratios})
        print(f"seed {seed}: {quick['seconds']:.1f} s, the baseline takes so many times as long: {ratios}")
    medians = {name: statistics.median(entry["ratios"][name] for entry in rounds) for name in ("fp32", "auto")}
    write_result("time_to_loss", {"target": TARGET, "rounds": rounds, "median_ratios": medians})


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
