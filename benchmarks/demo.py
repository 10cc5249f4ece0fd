"""What the demo reaches on this machine: held-out bits per byte, seconds of training, and what it writes.

python benchmarks/demo.py
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from record import write_result

import onecard


def main() -> None:
    events: list[Any] = []
    recipe = onecard.load_recipe("demo")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        onecard.train(recipe, output_dir=Path(folder) / "run", on_event=events.append)
        plan = onecard.plan(recipe)
    evaluations = [event for event in events if event.event == "evaluated"]
    samples = next(event for event in reversed(events) if event.event == "sampled").samples
    steps = [event for event in events if event.event == "step"]
    result = {
        "bits_per_byte": [(event.step, event.bits_per_byte) for event in evaluations],
        "training_s": events[-1].seconds,
        "steps_s": sum(event.step_s for event in steps),
        "waiting_share": sum(event.wait_s for event in steps) / sum(event.step_s for event in steps),
        "whole_s": time.perf_counter() - started,
        "parameters": plan.model.num_parameters,
        "tokens": events[-1].tokens_seen,
        "samples": [{"prompt": sample.prompt, "completion": sample.completion} for sample in samples],
    }
    print(f"{evaluations[-1].bits_per_byte:.3f} bits per byte after {result['training_s']:.0f} s of training")
    write_result("demo", result)


if __name__ == "__main__":
    main()
