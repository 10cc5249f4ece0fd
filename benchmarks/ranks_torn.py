"""A run that is killed and goes on with another number of processes: 2, then 1, then 4, against one left alone.

    python benchmarks/ranks_torn.py [--num_steps 50]

In fp32 on gloo, with dropout. One process is killed with SIGKILL once a step has been reached; all go on from the last
checkpoint. `same` is killed once and goes on with 2 as before: weights, moments and losses must be equal bit for bit.
"""

import argparse
import filecmp
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from ranks import make_cases, read_steps
from record import write_result

_PATIENCE_S = 600
# With how many processes each begins.
_RUNS = {"whole": 2, "torn": 2, "same": 2, "whole-4": 4, "same-4": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_steps", type=int, default=50)
    asked = parser.parse_args()
    num, rows = asked.num_steps, {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = make_cases(folder, num)["text, full"] | {"dropout": 0.1, "save_steps": num // 5, "max_restarts": 0}
        for strategy in ("ddp", "fsdp"):
            recipe, roots = folder / f"{strategy}.yaml", {name: folder / f"{strategy}-{name}" for name in _RUNS}
            recipe.write_text(yaml.safe_dump(text | {"strategy": strategy}), encoding="utf-8")
            for name, root in roots.items():
                until = None if name.startswith("whole") else num * 9 // 20
                run(["train", str(recipe), "--output_dir", str(root)], _RUNS[name], root, until)
            at_first_kill = read_steps(roots["torn"])[-1]["step"]
            run(["resume", str(roots["torn"])], 1, roots["torn"], num * 7 // 10)
            at_second_kill = read_steps(roots["torn"])[-1]["step"]
            run(["resume", str(roots["torn"])], 4, roots["torn"])
            for name in ("same", "same-4"):
                run(["resume", str(roots[name])], _RUNS[name], roots[name])
            rows[strategy] = {"killed_after_steps": [at_first_kill, at_second_kill]} | compare(roots)
            print(strategy, rows[strategy], flush=True)
    write_result("ranks_torn", {"num_steps": num, "rows": rows})


def run(words: list[str], num_processes: int, root: Path, kills_at: int | None = None) -> None:
    """Runs a command; kills one of its processes, the last that was started, once a step is in the record."""
    several = ["--num_processes", str(num_processes)] if num_processes > 1 else []
    process = subprocess.Popen([sys.executable, "-m", "onecard", *words, *several], stdout=subprocess.DEVNULL)
    if kills_at is not None:
        until = time.monotonic() + _PATIENCE_S
        while not root.joinpath("events.jsonl").exists() or not [1 for s in read_steps(root) if s["step"] >= kills_at]:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < until, "it takes too long"
            time.sleep(0.02)
        victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        trainers = [one for one in victims if one.cmdline()[-len(words) :] == words or one.pid == process.pid]
        max(trainers, key=lambda one: one.create_time()).kill()
    code = process.wait(_PATIENCE_S)
    assert (code != 0) == (kills_at is not None), code


def compare(roots: dict[str, Path]) -> dict[str, Any]:
    """How far the torn runs are from the whole one."""
    steps = {name: read_steps(root) for name, root in roots.items()}
    samples = {
        name: [(s["step"], s["tokens_seen"], s["num_target_tokens"]) for s in run] for name, run in steps.items()
    }
    losses = {name: [step["loss"] for step in run] for name, run in steps.items()}
    assert all(run == samples["whole"] for run in samples.values())
    found: dict[str, Any] = {
        "largest_difference_2_1_4": max(abs(a - b) for a, b in zip(losses["torn"], losses["whole"], strict=True))
    }
    folders = {name: max((root / "checkpoints").glob("step-*")) for name, root in roots.items()}
    files = sorted(path.name for path in folders["whole"].glob("*.safetensors"))
    for same, whole in (("same", "whole"), ("same-4", "whole-4")):
        is_equal = all(filecmp.cmp(folders[same] / name, folders[whole] / name, shallow=False) for name in files)
        found[f"{same}_is_bitwise"] = is_equal and losses[same] == losses[whole]
    return found | {"compared_files": files}


if __name__ == "__main__":
    main()
