"""A rank that is killed, hangs, runs out of memory or computes NaN: what the others do, and whether the run goes on.

    python benchmarks/ranks_lost.py [--seed 7]         # a quarter of an hour on two cores

Two processes, a tiny model, moments drawn from the seed, each kind twice: under plain `torchrun --max-restarts 2`, and
killed and stopped under `--num_processes 2`. A case is good if one message names the rank, the run goes on by itself to
its end, no process is left, every checkpoint on the way and at the end is whole, and the losses are those of the run
that nothing happened to (but after NaN, whose updates were refused).
"""

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from record import write_result

from onecard.checkpoint import read_checkpoint
from onecard.cli import main as onecard
from onecard.distributed.place import find_place
from onecard.errors import CheckpointError
from onecard.training import step as training_step

_NUM_STEPS, _SAVE_STEPS, _TIMEOUT_S, _LONGEST_S = 60, 10, 10, 240
_WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "brew",
    "jade",
)
_RECIPE = f"""
tokenizer: bytes
max_seq_length: 16
model_config: {{model_type: qwen3, intermediate_size: 48}}
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
num_key_value_heads: 2
dropout: 0.1
per_device_train_batch_size: 2
total_batch_size: 8
max_steps: {_NUM_STEPS}
eval_steps: 20
eval_batches: 2
save_steps: {_SAVE_STEPS}
save_total_limit: 9
precision: fp32
torch_compile: false
device: cpu
report_to: none
ddp_timeout: {_TIMEOUT_S}
"""
_KINDS = {"torchrun": ("kill", "hang", "memory", "nan"), "num_processes": ("kill", "hang")}
_SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}


def fall_ill(kind: str, rank: int, step: int) -> None:
    """Lets one rank run out of memory once, or compute NaN from a step on."""
    if find_place().rank != rank:
        return
    backward, made = training_step._backward, [0]

    def ill(state: Any, *arguments: Any, **keywords: Any) -> Any:
        loss = backward(state, *arguments, **keywords)
        if state.progress.step < step:
            return loss
        if kind == "nan":
            return loss * math.nan
        made[0] += 1
        if made[0] == 1:
            raise torch.OutOfMemoryError("injected")
        return loss

    training_step._backward = ill


def work(words: list[str]) -> None:
    """What torchrun starts: the command line, ill in its first attempt."""
    if (case := os.environ.get("ONECARD_ILL")) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kind, rank, step = case.split()
        if kind in ("memory", "nan"):
            fall_ill(kind, int(rank), int(step))
    onecard(words)


class Case:
    """One run with one mishap."""

    def __init__(self, folder: Path, way: str, kind: str, rank: int, step: int) -> None:
        self.folder, self.way, self.kind, self.rank, self.step = folder, way, kind, rank, step
        self.root = folder / f"{way}-{kind}-{step}"
        self._noise = self.root.with_suffix(".txt")

    def run(self) -> dict[str, Any]:
        words = ["train", str(self.folder / "tiny.yaml"), "--output_dir", str(self.root)]
        if self.way == "torchrun":
            torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
            command = [*torchrun, __file__, "--work", *words]
        else:
            command = ["onecard", *words, "--num_processes", "2"]
        begun = time.perf_counter()
        with self._noise.open("w") as noise:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=subprocess.DEVNULL,
                stderr=noise,
                env=os.environ | {"ONECARD_ILL": f"{self.kind} {self.rank} {self.step}"},
            )
            if self.kind in _SIGNALS:
                self._strike(process)
            try:
                code: int | None = process.wait(timeout=_LONGEST_S)
            except subprocess.TimeoutExpired:
                process.terminate()
                code = None
        left = self._processes()
        for one in left:
            one.kill()
        return self._judge(code, time.perf_counter() - begun, len(left))

    def _strike(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and len(steps_of(self.root)) < self.step:
            time.sleep(0.02)
        for one in self._processes():
            if one.environ().get("RANK") == str(self.rank) and "TORCHELASTIC_RUN_ID" in one.environ():
                one.send_signal(_SIGNALS[self.kind])

    def _processes(self) -> list[psutil.Process]:
        found = []
        for one in psutil.process_iter(["cmdline", "status"]):
            if str(self.root) in (one.info["cmdline"] or ()) or (
                one.info["status"] == psutil.STATUS_ZOMBIE and one.ppid() == os.getpid()
            ):
                found.append(one)
        return found

    def _judge(self, code: int | None, seconds: float, num_left: int) -> dict[str, Any]:
        lines = self._noise.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [
            line for line in lines if re.search(rf"\brank {self.rank}\b", line) and "torch/distributed" not in line
        ]
        found, losses = [], {step["step"]: step["loss"] for step in steps_of(self.root)}
        if code != 0:
            found.append(f"exit code {code}")
        if len(named) != 1:
            found.append(f"named {len(named)} times")
        if num_left:
            found.append(f"{num_left} processes left")
        if any("Traceback" in line for line in lines):
            found.append("a traceback")
        for checkpoint in sorted((self.root / "checkpoints").glob("step-*")):
            try:
                read_checkpoint(checkpoint)
            except CheckpointError as error:
                found.append(str(error))
        if sorted(losses) != list(range(1, _NUM_STEPS + 1)):
            found.append(f"{len(losses)} steps")
        elif self.kind != "nan" and losses != self._whole():
            found.append("other losses")
        words = f"{self.way}, {self.kind} of rank {self.rank} at step {self.step}"
        print(f"{words}: {'; '.join(found) or 'good'} ({seconds:.0f} s)  {named[:1]}", flush=True)
        return {"case": words, "problems": found, "seconds": round(seconds), "said": named}

    def _whole(self) -> dict[int, float]:
        return {step["step"]: step["loss"] for step in steps_of(self.folder / "whole")}


def steps_of(root: Path) -> list[dict[str, Any]]:
    try:
        lines = (root / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.startswith('{"event": "step"') and line.endswith("}")]


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "text.txt").write_text(" ".join(draw.choices(_WORDS, k=3000)), encoding="utf-8")
        recipe = f"dataset: {folder / 'text.txt'}\n{_RECIPE}"
        (folder / "tiny.yaml").write_text(recipe, encoding="utf-8")
        whole = ["train", str(folder / "tiny.yaml"), "--output_dir", str(folder / "whole"), "--num_processes", "2"]
        subprocess.run([sys.executable, "-m", "onecard", *whole], check=True, stdout=subprocess.DEVNULL)
        rows = [
            Case(folder, way, kind, (number + turn) % 2, draw.randint(12, _NUM_STEPS - 12)).run()
            for way, kinds in _KINDS.items()
            for number, kind in enumerate(kinds)
            for turn in range(2)
        ]
    num_good = sum(not row["problems"] for row in rows)
    print(f"{num_good} of {len(rows)} good")
    write_result("ranks_lost", {"seed": asked.seed, "num_good": num_good, "num_cases": len(rows), "rows": rows})


if __name__ == "__main__":
    main()
