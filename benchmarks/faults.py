"""Kills, failing disks, damaged files, a lost GPU and planted pickles, each followed by `onecard resume`.

    python benchmarks/faults.py                      # all of it, some minutes on one core; goes on where it stopped
    python benchmarks/faults.py --only kills --seed 7

Each case is drawn from the seed and its number. A case is good if the run ends with the weights and the record of the
run that nothing happened to, without a traceback on the way. Processes are forked from one that has loaded PyTorch, so
this runs on Linux only.
"""

import argparse
import errno
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults_memory
import faults_pickles
import faults_ways
import psutil
import torch
from record import RESULTS, read_rows, save_result
from words import WORDS

from onecard.cli import main
from onecard.observe.events import CLOCK_FIELDS, CLOCK_REASONS, depends_on_clock
from onecard.observe.lines import parse_event

RECIPE = """
tokenizer: bytes
max_seq_length: 16
model_config: {model_type: qwen3, intermediate_size: 48}
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
num_key_value_heads: 2
dropout: 0.1
per_device_train_batch_size: 3
total_batch_size: 8
max_steps: 40
eval_steps: 8
eval_batches: 2
sample_steps: 10
sample_prompts: ["the "]
sample_max_new_tokens: 4
save_steps: 3
save_total_limit: 4
dataloader_num_workers: 1
precision: fp32
torch_compile: false
device: cpu
report_to: [tensorboard]
"""
# What the forked processes need not load again.
_LOADED_ONCE = (
    *("onecard.api", "onecard.cli.app", "onecard.run.session", "onecard.run.outcome", "onecard.run.changes"),
    *("onecard.planner.on_cpu", "onecard.observe.tensorboard", "transformers.models.qwen3.modeling_qwen3"),
    *("peft", "onecard.run.judge", "transformers.models.llama.modeling_llama"),
)


class Workshop:
    """A folder with a recipe, its text, and the run that nothing happened to, per way of saving."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = " ".join(random.Random(1).choices(WORDS, k=3000))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        recipe = f"dataset: {folder / 'text.txt'}\n{RECIPE}"
        (folder / "tiny.yaml").write_text(recipe, encoding="utf-8")
        for name in _LOADED_ONCE:
            importlib.import_module(name)
        self.ways = faults_ways.make_ways(folder)
        self.whole_s: dict[tuple[bool, str], float] = {}
        for in_background in (False, True):
            self.whole(in_background)

    def whole(self, in_background: bool, way: str = "plain") -> Path:
        """The run that nothing happened to; made when it is first asked for."""
        run = self.folder / f"whole-{in_background}-{way}"
        if not run.exists():
            child = fork(self.words(run, way), in_background, self.folder / "whole.txt", self.ways[way].patch)
            wait_for(run / "plan.json")
            started = time.perf_counter()
            _, status = os.waitpid(child, 0)
            assert status == 0, (self.folder / "whole.txt").read_text(encoding="utf-8")
            self.whole_s[in_background, way] = time.perf_counter() - started
        return run

    def words(self, run: Path, way: str = "plain") -> list[str]:
        return ["train", str(self.ways[way].recipe), *self.ways[way].flags, "--output_dir", str(run)]

    def call(self, words: list[str], in_background: bool, patch: Callable[[], None] | None = None) -> tuple[int, str]:
        """Runs a command in a forked process; gives its exit code and what it wrote to stderr."""
        log = self.folder / "stderr.txt"
        child = fork(words, in_background, log, patch)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")

    def problems(self, run: Path, in_background: bool, way: str = "plain") -> list[str]:
        """In what a run differs from the one that nothing happened to."""
        whole, found = self.whole(in_background, way), []
        if events_of(run) != events_of(whole):
            found.append("events differ")
        last, other = (sorted((root / "checkpoints").glob("step-*"))[-1] for root in (run, whole))
        names = {path.name for path in other.glob("*.safetensors")}
        if last.name != other.name or {path.name for path in last.glob("*.safetensors")} != names:
            return [*found, "other checkpoints"]
        return found + [
            f"{name} differs" for name in names if (last / name).read_bytes() != (other / name).read_bytes()
        ]

    def resume(self, run: Path, in_background: bool, way: str = "plain") -> list[str]:
        """Goes on with a run; gives everything that is not as it should be."""
        code, errors = self.call(["resume", str(run)], in_background, self.ways[way].patch)
        found = [f"exit code {code}: {errors.strip()[-300:]}"] if code else []
        found += ["a traceback"] if "Traceback" in errors else []
        return found or self.problems(run, in_background, way)


def fork(words: list[str], in_background: bool, log: Path, patch: Callable[[], None] | None = None) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        from onecard.planner import measure
        from onecard.run import checkpoints

        measure._PEAK_SIZE = {"cpu": 64}
        checkpoints.LEAST_BYTES_IN_BACKGROUND = 0 if in_background else 1 << 62
        checkpoints._LAST_PAUSES_S = (0.05, 0.05)
        if patch is not None:
            patch()
        main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def events_of(run: Path) -> list[dict[str, Any]]:
    """The record without what a clock or a sensor decides."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines if not depends_on_clock(parse_event(line))]
    kept = [event for event in events if event.get("reason") not in CLOCK_REASONS or event["event"] != "saved"]
    return [{key: value for key, value in event.items() if key not in CLOCK_FIELDS} for event in kept]


def kill_once(shop: Workshop, number: int, draw: random.Random) -> dict[str, Any]:
    """Kills a run at a random moment, or in the midst of a save or of going back, and goes on with it."""
    while (row := kill_if_there(shop, number, draw)) is None:
        pass  # it had come to its end before: another moment
    return row


def kill_if_there(shop: Workshop, number: int, draw: random.Random) -> dict[str, Any] | None:
    """The same; None where the run had ended before the moment that was drawn."""
    in_background, at_save = number % 2 == 1, number % 4 >= 2
    way = list(shop.ways)[number // 4 % len(shop.ways)]
    shop.whole(in_background, way)
    run, own = shop.folder / f"killed-{number}", shop.ways[way]
    child = fork(shop.words(run, way), in_background, shop.folder / "killed.txt", own.patch)
    wait_for(run / "plan.json")
    if at_save:
        saves = range(own.save_steps, faults_ways.NUM_STEPS - own.save_steps, own.save_steps)
        wait_for(run / "checkpoints" / f"step-{draw.choice(saves):06d}", or_gone=child)
        deadline = time.perf_counter() + 5
        while not any((run / "checkpoints").glob(own.sign)) and time.perf_counter() < deadline:
            if is_gone(child):
                break
        time.sleep(draw.random() * 0.01)
    else:
        time.sleep(draw.random() * shop.whole_s[in_background, way] * 0.9)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    saving = bool([*(run / "checkpoints").glob(own.sign)])
    problems = shop.resume(run, in_background, way) if status else []
    shutil.rmtree(run)
    row = {"way": way, "in_background": in_background, "killed": True, "while_saving": saving}
    return row | {"problems": problems} if status else None


def wait_for(path: Path, or_gone: int | None = None) -> None:
    deadline = time.perf_counter() + 120
    while not path.exists() and time.perf_counter() < deadline and not (or_gone and is_gone(or_gone)):
        time.sleep(0.001)


def is_gone(child: int) -> bool:
    return psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def kill_supervised(shop: Workshop, number: int, draw: random.Random) -> dict[str, Any]:
    """Kills the worker of a real command twice; its supervisor has to bring the run to its end by itself."""
    run = shop.folder / f"supervised-{number}"
    command = [sys.executable, "-m", "onecard", *shop.words(run), "--max_steps", "100"]
    whole = shop.folder / "whole-supervised"
    if not whole.exists():
        words = [*command[:-3], str(whole), *command[-2:]]
        subprocess.run(words, check=True, capture_output=True)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as supervisor:
        for _ in range(2):
            step = draw.randrange(5, 40)
            wait_for(run / "checkpoints" / f"step-{3 * (step // 3 + 1):06d}", or_gone=supervisor.pid)
            for worker in psutil.Process(supervisor.pid).children():
                worker.kill()
            time.sleep(0.5)
        errors = supervisor.communicate(timeout=600)[1]
    problems = [] if supervisor.returncode == 0 else [f"exit code {supervisor.returncode}: {errors[-300:]}"]
    problems += ["a traceback"] if "Traceback" in errors else []
    problems += [] if events_of(run) == events_of(whole) else ["events differ"]
    restarts = errors.count("is started again")
    shutil.rmtree(run)
    return {"restarts": restarts, "problems": problems}


def way_of(shop: Workshop, number: int) -> str:
    """Two cases of each kind of run in turn: saving at once, and in the background."""
    return list(shop.ways)[number // 2 % len(shop.ways)]


def both(*patches: Callable[[], None] | None) -> Callable[[], None]:
    def apply() -> None:
        for patch in patches:
            if patch is not None:
                patch()

    return apply


ERRNOS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.ESTALE)


def fail_writes(draw: random.Random) -> Callable[[], None]:
    """Lets some saves fail: at a random byte of a file by a limit of the system, or at a random call by an error."""
    faulty = {draw.randrange(12) for _ in range(draw.randrange(1, 4))}
    limit, number, call = draw.randrange(1, 60_000), draw.choice(ERRNOS), draw.randrange(10)
    by_limit = draw.random() < 0.5

    def patch() -> None:
        from onecard.run import saver

        write, saves = saver.write_checkpoint, iter(range(10**6))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def failing(*arguments: Any) -> int:
            if next(saves) not in faulty:
                return write(*arguments)
            if by_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                try:
                    return write(*arguments)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            calls, own = iter(range(10**6)), os.fsync

            def refuse(descriptor: int) -> None:
                if next(calls) == call:
                    raise OSError(number, os.strerror(number))
                own(descriptor)

            os.fsync = refuse
            try:
                return write(*arguments)
            finally:
                os.fsync = own

        saver.write_checkpoint = failing

    return patch


def fail_disk(shop: Workshop, number: int, draw: random.Random) -> dict[str, Any]:
    """A disk that refuses some saves: the run ends by itself, or at worst is resumed, with the same weights."""
    in_background, way = number % 2 == 1, way_of(shop, number)
    if way == "refused":  # goes back to the newest checkpoint that is there, which depends on what was refused
        way = "plain"
    run = shop.folder / f"disk-{number}"
    code, errors = shop.call(shop.words(run, way), in_background, both(shop.ways[way].patch, fail_writes(draw)))
    problems = ["a traceback"] if "Traceback" in errors else []
    problems += [] if code in (0, 2) else [f"exit code {code}: {errors[-300:]}"]
    if code:
        problems += shop.resume(run, in_background, way)
    else:
        problems += [text for text in shop.problems(run, in_background, way) if text != "events differ"]
    record = (run / "events.jsonl").read_text(encoding="utf-8")
    steps = [event["step"] for event in events_of(run) if event["event"] == "step"]
    problems += [] if steps == list(range(1, 41)) else ["steps are missing from the record"]
    shutil.rmtree(run)
    return {
        "way": way,
        "exit_code": code,
        "refused_saves_told": record.count("checkpoint-not-written"),
        "problems": problems,
    }


def lose_device(shop: Workshop, number: int, draw: random.Random) -> dict[str, Any]:
    """A step that fails as if the GPU were gone: exit code 5, which the supervisor answers by a new process."""
    run, step, way = shop.folder / f"device-{number}", draw.randrange(40), way_of(shop, number)

    def patch() -> None:
        from onecard.run import stepping

        train_step = stepping.train_step

        def lose(state: Any, *arguments: Any, **settings: Any) -> Any:
            if state.progress.step == step:
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")
            return train_step(state, *arguments, **settings)

        stepping.train_step = lose

    code, errors = shop.call(shop.words(run, way), number % 2 == 1, both(shop.ways[way].patch, patch))
    problems = ["a traceback"] if "Traceback" in errors else []
    problems += [] if code == 5 else [f"exit code {code}"]
    problems += shop.resume(run, number % 2 == 1, way)
    shutil.rmtree(run)
    return {"way": way, "step": step, "problems": problems}


DAMAGES = ("flip", "cut", "empty", "remove")


def half_done(shop: Workshop) -> Path:
    """A run that was killed in the middle, with some checkpoints."""
    run = shop.folder / "half"
    if not run.exists():
        child = fork(shop.words(run), False, shop.folder / "half.txt")
        wait_for(run / "checkpoints" / "step-000021")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return run


def damage_file(shop: Workshop, number: int, draw: random.Random) -> dict[str, Any]:
    """Damages one file of the newest checkpoint: every kind of file in every way, in turn."""
    half, run = half_done(shop), shop.folder / f"damaged-{number}"
    shutil.copytree(half, run)
    newest = sorted((run / "checkpoints").glob("step-*/manifest.json"))[-1].parent
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    path, how = files[number % len(files)], DAMAGES[(number + number // len(files)) % len(DAMAGES)]
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content if how == "flip" else content[: draw.randrange(len(content))] if how == "cut" else b"")
    if how == "remove":
        path.unlink()
    problems = shop.resume(run, False)
    shutil.rmtree(run)
    return {"file": path.name, "how": how, "problems": problems}


CASES: dict[str, tuple[Callable[[Workshop, int, random.Random], dict[str, Any]], int]] = {
    "kills": (kill_once, 50),
    "supervised": (kill_supervised, 4),
    "disk": (fail_disk, 30),
    "device": (lose_device, 10),
    "files": (damage_file, 60),
    "pickles": (faults_pickles.plant_pickle, len(faults_pickles.WAYS)),
}


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    path = RESULTS / "faults.json"
    rows = read_rows(path) if not arguments.again else {}
    rows = {name: row for name, row in rows.items() if row.get("seed") == arguments.seed}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.environ["ONECARD_CACHE"] = str(Path(folder) / "cache")
        os.environ["ONECARD_HOME"] = str(Path(folder) / "home")
        shop = None
        for kind, (case, count) in CASES.items():
            for number in range(arguments.count or count):
                name = f"{kind}-{number:03d}"
                if (arguments.only and kind not in arguments.only) or name in rows:
                    continue
                shop = shop or Workshop(Path(folder))
                row = case(shop, number, random.Random(f"{arguments.seed}-{name}"))
                rows[name] = {"seed": arguments.seed, **row}
                print(name, json.dumps(row), flush=True)
                save_result(path, {"summary": summarize(rows), "rows": rows})
        if not arguments.only or "memory" in arguments.only:
            for number, row in enumerate(faults_memory.run(arguments.seed, arguments.count or 30)):
                rows[f"memory-{number:03d}"] = {"seed": arguments.seed, **row}
            save_result(path, {"summary": summarize(rows), "rows": rows})
    return summarize(rows)


def summarize(rows: dict[str, Any]) -> dict[str, Any]:
    """Per kind of fault: how many cases, and how many of them were good."""
    found: dict[str, Any] = {}
    for name, row in rows.items():
        kind = name.rsplit("-", 1)[0]
        entry = found.setdefault(kind, {"cases": 0, "good": 0})
        num_cases, num_good = count_cases(row)
        entry["cases"] += num_cases
        entry["good"] += num_good
        if "while_saving" in row:
            entry["while_saving"] = entry.get("while_saving", 0) + row["while_saving"]
            entry["killed"] = entry.get("killed", 0) + row["killed"]
    return found


def count_cases(row: dict[str, Any]) -> tuple[int, int]:
    """How many cases a row tells of, and how many of them were good; one that met no fault is none."""
    if "runs" in row:  # of memory and numbers: many runs each
        return row["runs"] - row["not met"], row["right"]
    return int(row.get("killed", True)), int(row.get("killed", True) and not row["problems"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=[*CASES, "memory"])
    parser.add_argument("--count", type=int, help="cases of each kind")
    parser.add_argument("--again", action="store_true", help="begin anew instead of going on")
    print(json.dumps(run_all(parser.parse_args()), indent=1))
