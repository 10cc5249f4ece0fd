"""Malformed recipes, flags, models, data and runs for every command, written by hand and drawn: is each one refused?

    python benchmarks/malformed.py                   # all of it, half an hour on one core; goes on where it stopped
    python benchmarks/malformed.py --only serve --show

A case is good if the command ends with exit code 2 (3 where the mistake is one of size), with a message on stderr that
names what was given and says what to change, without a traceback, and if no file is changed, removed or added. Drawn
cases spoil one of the inputs of a working command by the seed; a draw that does no harm is drawn again and counted.
Processes are forked from one that has loaded PyTorch, so this runs on Linux only.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import malformed_cases
import psutil
from malformed_cases import CASES, Case
from malformed_draws import DRAWS, Draw
from record import RESULTS, earlier_result, save_result

from onecard.cli import main

_LOADED_ONCE = (
    *("onecard.api", "onecard.cli.app", "onecard.run.session", "onecard.run.outcome", "onecard.run.changes"),
    *("onecard.run.evaluate", "onecard.run.verify", "onecard.handover.export", "onecard.model.lora"),
    *(
        "onecard.planner.on_cpu",
        "onecard.planner.ladder",
        "transformers.models.qwen3.modeling_qwen3",
        "pyarrow.parquet",
    ),
)
# A command that has not ended after so many seconds of its own, or ten times as many of the clock, hangs; a document
# that grows to so many bytes is a bomb.
_LIMIT_S, _LIMIT_BYTES = 120, 24 << 30
_LOOK_S = 0.01
_NUM_STEPS = 6
_MAX_DRAWS = 40
# A message says what to change by one of these, or names what would have been right.
_REMEDY = re.compile(
    r"\b(use|give|choose|set|check|copy|download|restore|did you mean|write|mend|save|delete|start|name|leave|keep|end"
    r"|lower|put|install|takes?|must|try|fetch|needs?|look|lies?|one of|remove|run|make|extract|add|resume|say|raise"
    r"|change|is not a valid|is not in the range|is not one of|lists (them|all)|is one word|leads?|it has|known|instead"
    r"|sweep over|there (is|are)|no such (option|command))\b",
    re.IGNORECASE,
)
_RAW = re.compile(r"Traceback|defect of onecard|\b[A-Z]\w+(Error|Exception)\b|NoneType|<class|object at 0x|KeyError")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind; `changes` are files that are not as they were."""

    code: int
    stdout: str
    stderr: str
    changes: tuple[str, ...]

    @property
    def message(self) -> str:
        """What stderr says, on one line and without the frame of a usage message."""
        return " ".join(re.sub(r"[─│╭╮╰╯]", " ", self.stderr).split())


class Workshop:
    """A folder of inputs that work, which every case finds as they were made."""

    def __init__(self, root: Path) -> None:
        self.root, self.place, self.pristine = root, root / "place", root / "pristine"
        os.environ |= {"ONECARD_CACHE": str(root / "cache"), "ONECARD_HOME": str(root / "place" / "home")}
        os.environ |= {"HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1", "COLUMNS": "400", "NO_COLOR": "1"}
        for name in _LOADED_ONCE:
            importlib.import_module(name)
        self.place.mkdir()
        malformed_cases.write_inputs(self.place)
        for words in malformed_cases.MADE_BY:
            outcome = self.call(words, is_probe=False)
            assert outcome.code == 0, f"{words}: {outcome.stderr}"
        self.place.rename(self.pristine)
        self.restore()

    def restore(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.pristine, self.place, symlinks=True)

    def run(self, words: str, spoil: Callable[[Path], object], stdin: bytes = b"") -> Outcome:
        """Runs a command among inputs of which `spoil` has changed some."""
        self.restore()
        spoil(self.place)
        return self.call(words, stdin)

    def call(self, words: str, stdin: bytes = b"", *, is_probe: bool = True) -> Outcome:
        before = snapshot(self.place)
        (self.root / "stdin").write_bytes(stdin)
        child = os.fork()
        if not child:
            self._become(shlex.split(words), is_probe=is_probe)
        status = wait_for(child)
        after = snapshot(self.place)
        # A lock is left where a folder was looked at, and says nothing.
        changes = sorted(name for name in before | after if before.get(name) != after.get(name))
        stdout, stderr = ((self.root / name).read_text("utf-8", "replace") for name in ("stdout", "stderr"))
        return Outcome(os.waitstatus_to_exitcode(status), stdout, stderr, tuple(changes))

    def _become(self, words: list[str], *, is_probe: bool) -> None:
        """Is the command; ends the process."""
        code = 99
        try:
            os.chdir(self.place)
            for number, name in enumerate(("stdin", "stdout", "stderr")):
                flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                os.dup2(os.open(self.root / name, flags), number)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
            if is_probe:
                # Of its own seconds: a busy machine is no mistake of the command.
                resource.setrlimit(resource.RLIMIT_CPU, (_LIMIT_S, _LIMIT_S))
                resource.setrlimit(resource.RLIMIT_AS, (_LIMIT_BYTES, _LIMIT_BYTES))
            _stop_early()
            main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def wait_for(child: int) -> int:
    """Waits for a process and gives its status; ends one that does nothing, but not while somebody has stopped it."""
    waited_s = 0.0
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(_LOOK_S)
        waited_s += _LOOK_S * (psutil.Process(child).status() != psutil.STATUS_STOPPED)
        if waited_s > 10 * _LIMIT_S:
            os.kill(child, signal.SIGKILL)
    return ended[1]


def _stop_early() -> None:
    """Lets a command that was accepted end: training after some steps, serving before it listens."""
    from onecard.handover import server
    from onecard.planner import measure
    from onecard.run import checkpoints, stepping

    measure._PEAK_SIZE = {"cpu": 64}
    checkpoints.LEAST_BYTES_IN_BACKGROUND = 1 << 62
    server.run_server = lambda *_: None
    train_step, steps = stepping.train_step, iter(range(_NUM_STEPS))

    def step(*arguments: Any, **settings: Any) -> Any:
        if next(steps, None) is None:
            os._exit(0)
        return train_step(*arguments, **settings)

    stepping.train_step = step


def snapshot(folder: Path) -> dict[str, str]:
    """Hashes every file of a folder but locks, links by where they lead."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*files, *folders]:
            path = Path(parent, name)
            if name == ".lock":
                continue
            if path.is_symlink():
                found[str(path.relative_to(folder))] = str(path.readlink())
            elif path.is_file():
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path.relative_to(folder))] = "folder"
    return found


def judge(outcome: Outcome, names: tuple[str, ...], codes: tuple[int, ...]) -> list[str]:
    """Says what is wrong with how a command refused its input."""
    message = outcome.message
    found = [] if outcome.code in codes else [f"exit code {outcome.code}"]
    found += ["a traceback"] if "Traceback" in outcome.stderr else []
    if raw := _RAW.search(message):
        found.append(f"words of the program: {raw[0]}")
    found += [f"does not name {name}" for name in names if name.lower() not in message.lower()]
    found += [] if _REMEDY.search(message) else ["no remedy"]
    found += [f"changed: {', '.join(outcome.changes[:5])}"] if outcome.changes else []
    return found


def run_case(shop: Workshop, case: Case) -> dict[str, Any]:
    outcome = shop.run(case.words, case.spoil, case.stdin)
    return row_of(shop, case.words, outcome, judge(outcome, case.names, (case.code,)))


def run_draw(shop: Workshop, draw: Draw, seed: str) -> dict[str, Any]:
    """Spoils an input until the command minds."""
    source, harmless = random.Random(seed), 0
    while harmless < _MAX_DRAWS:
        told: list[str] = []
        outcome = shop.run(draw.words, lambda place, told=told: told.append(draw.spoil(place, source)), draw.stdin)
        if outcome.code != 0 or "Traceback" in outcome.stderr:
            names = draw.names if draw.names is not None else (Path(draw.target).name,)
            problems = judge(outcome, names, (2, 3))
            return row_of(shop, draw.words, outcome, problems) | {"drawn": told[-1], "harmless": harmless}
        harmless += 1
    return {"command": draw.words, "drawn": "nothing that does harm", "harmless": harmless, "problems": []}


def row_of(shop: Workshop, words: str, outcome: Outcome, problems: list[str]) -> dict[str, Any]:
    message = outcome.message.replace(f"{shop.place}/", "").replace(str(shop.place), ".").replace(str(shop.root), "")
    message = message.replace(sys.prefix, "PREFIX")
    shown = message if problems else message[:400]
    return {"command": words[:200], "exit_code": outcome.code, "message": shown[-3000:], "problems": problems}


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the cases in some processes, each with a workshop of its own; goes on where an earlier call ended."""
    arguments.done = {} if arguments.only or arguments.again else good_rows(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="malformed-") as folder:
        root = Path(folder).resolve()
        parts = [root / str(number) for number in range(arguments.jobs)]
        children = []
        for number, part in enumerate(parts):
            part.mkdir()
            if not (child := os.fork()):
                run_part(arguments, number, part)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert not any(codes), f"a process failed: {codes}"
        found = [json.loads((part / "rows.json").read_text(encoding="utf-8")) for part in parts]
    rows = dict(sorted([*arguments.done.items(), *(pair for part in found for pair in part.items())]))
    summary = summarize(rows)
    if not arguments.only:
        told = {name: row if row["problems"] else shortened(row) for name, row in rows.items()}
        save_result(RESULTS / "malformed.json", {"seed": arguments.seed, "summary": summary, "rows": told})
    return summary


def good_rows(seed: int) -> dict[str, Any]:
    """Rows of an earlier call on the same code that had no problem."""
    earlier = earlier_result("malformed")
    rows = earlier["rows"] if earlier.get("seed") == seed else {}
    return {name: row for name, row in rows.items() if not row["problems"]}


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"command": row["command"][:60], "message": row.get("message", "")[:150]}


def run_part(arguments: argparse.Namespace, number: int, folder: Path) -> None:
    """Runs every `jobs`-th case, prints what is wrong, leaves the rows in the folder, and ends the process."""
    code, started = 1, time.monotonic()
    try:
        shop, rows = Workshop(folder), {}
        cases = [pair for pair in all_cases(arguments.seed) if is_wanted(pair[0], arguments)]
        # In any order, so that what is done when somebody stops it is a fair part.
        random.Random(arguments.seed).shuffle(cases)
        for name, run in cases[number :: arguments.jobs]:
            rows[name] = row = run(shop)
            if row["problems"] or arguments.show:
                told = (row["command"], row.get("drawn", ""), f"{row.get('exit_code')} {row.get('message')}")
                print("\n    ".join([name, *told, "; ".join(row["problems"]) or "good"]), flush=True)
            (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
            if time.monotonic() - started > arguments.minutes * 60:
                break
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def is_wanted(name: str, arguments: argparse.Namespace) -> bool:
    words = arguments.only
    return name not in arguments.done and (not words or any(word in name for word in words))


def all_cases(seed: int) -> list[tuple[str, Callable[[Workshop], dict[str, Any]]]]:
    """Every case by its name."""
    found: list[tuple[str, Callable[[Workshop], dict[str, Any]]]] = [
        (f"hand-{number:03d}: {case.what}", partial(run_case, case=case)) for number, case in enumerate(CASES)
    ]
    for number, draw in enumerate(DRAWS):
        found += [
            (
                f"drawn-{number:03d}.{turn:02d}: {draw.target}",
                partial(run_draw, draw=draw, seed=f"{seed}-{number}-{turn}"),
            )
            for turn in range(draw.times)
        ]
    return found


def summarize(rows: dict[str, Any]) -> dict[str, Any]:
    """Counts cases and good ones in all, by command and by how they were made."""
    cases = {name: row for name, row in rows.items() if "exit_code" in row}
    verbs: dict[str, Counter[str]] = {}
    for row in cases.values():
        found = verbs.setdefault(verb_of(row["command"]), Counter(cases=0, good=0))
        found.update(cases=1, good=int(not row["problems"]))
    return {
        "cases": len(cases),
        "good": sum(not row["problems"] for row in cases.values()),
        "by_hand": sum("drawn" not in row for row in cases.values()),
        "drawn": sum("drawn" in row for row in cases.values()),
        "harmless_draws": sum(row.get("harmless", 0) for row in rows.values()),
        "exit_codes": dict(sorted(Counter(str(row["exit_code"]) for row in cases.values()).items())),
        "verbs": {name: dict(counts) for name, counts in sorted(verbs.items())},
    }


def verb_of(command: str) -> str:
    """The command's first word that names a verb; of slips in it, none."""
    from onecard.cli.app import app

    verbs = {entry.callback.__name__.replace("_", "-") for entry in app.registered_commands if entry.callback}
    return next((word for word in command.split()[:1] if word in verbs), "none")


def print_table(summary: dict[str, Any]) -> None:
    print(f"{'command':12}{'cases':>7}{'good':>7}")
    for name, counts in [*summary["verbs"].items(), ("all", summary)]:
        print(f"{name:12}{counts['cases']:7}{counts['good']:7}")
    print(
        f"{summary['by_hand']} by hand, {summary['drawn']} drawn beside {summary['harmless_draws']} that did no harm;"
        f" exit codes {summary['exit_codes']}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="end with the cases done by then")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--only", nargs="*", help="cases with one of these words in their name")
    parser.add_argument("--again", action="store_true", help="begin anew instead of going on")
    parser.add_argument("--show", action="store_true", help="print every message, not only those with a problem")
    print_table(run_all(parser.parse_args()))
