"""How soon a held-out loss of 1.88 is reached on tiny Shakespeare, against nanoGPT's CPU setting with AdamW at 1e-3.

Both train in this process, one after the other and in turn, with the same code. Time counts training steps only, not the
evaluations that look for the moment. The default is `shakespeare-char-cpu` cut to a schedule that ends at 1.88.

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
    parser.add_argument("--steps", type=int, default=350, help="length of the short schedule")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    pairs = []
    for repeat in range(arguments.repeats):
        seed = 1337 + repeat
        baseline = time_to_target(BASELINE, arguments.text, {"seed": seed, "eval_steps": 50, "precision": "fp32"})
        short = time_to_target("shakespeare-char-cpu", arguments.text, {"seed": seed, "max_steps": arguments.steps, "eval_steps": 10})
        pairs.append({"seed": seed, "baseline": baseline, "default": short, "ratio": baseline["seconds"] / short["seconds"]})
        print(f"seed {seed}: {baseline['seconds']:.1f} s against {short['seconds']:.1f} s, ratio {pairs[-1]['ratio']:.2f}")
    write_result("time_to_loss", {"target": TARGET, "pairs": pairs, "ratio": statistics.median(p["ratio"] for p in pairs)})


def time_to_target(source: Any, text: Path, overrides: dict[str, Any]) -> dict[str, float]:
    """Seconds of training steps until the held-out loss is at most the target, and of the whole schedule."""
    recipe = onecard.load_recipe(source, **{**BUDGET, **overrides}, dataset=str(text), report_to="none", sample_prompts=[], save_steps=0)
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
    assert reached is not None, f"never reached {TARGET}: {losses[-3:]}"
    return {"step": reached[0], "seconds": reached[1], "seconds_of_schedule": seconds, "final_loss": losses[-1][1]}


if __name__ == "__main__":
    main()
