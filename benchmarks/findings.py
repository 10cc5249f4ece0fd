"""Real sick runs and what is found in them; real healthy runs and what is not.

    python benchmarks/findings.py                     # diseases in seconds each, then healthy runs of a minute each
    python benchmarks/findings.py --seconds 40 --only healthy

The runs are those of tests/run/sick_runs.py. The tests make healthy ones for seconds, in which detectors that need a
time cannot speak; here they last, and sensors are read every second. What the machine itself does meanwhile (others on
its CPU, steps slower than planned) is no false alarm where it is so, and is told by itself.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from record import RESULTS, read_rows, save_result

from onecard.observe.detectors.history import LEAST_ELAPSED_S

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "run"), str(Path(__file__).parents[1] / "tests")]

from sick_runs import DISEASES, HEALTHY, LONG_TEXT, MACHINE, Kind, Place, run  # noqa: E402
from tiny_models import make_base  # noqa: E402

# Text and chats that are few on purpose would be learned by heart in so long a time, which is then found rightly.
_SHORT = ("tiny text", "early stopping", "batch of one")
_READING_INTERVAL_S = 1.0
# No step of these tiny models takes so long by itself.
_PAUSE_S, _NUM_TRIES = 10.0, 4


def measure(kind: Kind, *, in_earnest: bool) -> dict[str, Any]:
    """Makes a run; `in_earnest` with the detectors' own least times."""
    begun_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if in_earnest:
            patch.setattr("onecard.run.observation._READING_INTERVAL_S", _READING_INTERVAL_S)
        place = Place(Path(folder), lambda family: make_base(family, Path(folder) / "bases"))
        found = run(kind, place, patch)
        events = [json.loads(line) for line in (Path(folder) / "run" / "events.jsonl").read_text("utf-8").splitlines()]
    steps_s = [event["step_s"] for event in events if event["event"] == "step"]
    return {
        "found": sorted(found),
        "evidence": {id: finding.evidence for id, finding in found.items()},
        "remedy": {id: finding.remedy for id, finding in found.items()},
        "steps": len(steps_s),
        "longest_step_s": round(max(steps_s, default=0.0), 1),
        "trained_s": round(max((event["elapsed_s"] for event in events), default=0.0), 1),
        "seconds": round(time.perf_counter() - begun_s, 1),
    }


def measure_again_if_paused(kind: Kind, name: str) -> dict[str, Any]:
    """Makes a run anew where the machine stood still meanwhile, or while the plan measured how many steps it allows."""
    half, _, short = name.partition(": ")
    lasts = half == "healthy" and short not in _SHORT
    for _ in range(_NUM_TRIES):
        row = measure(kind, in_earnest=half == "healthy")
        if row["longest_step_s"] < _PAUSE_S and (not lasts or row["trained_s"] >= LEAST_ELAPSED_S):
            break
    return row


def lasting(name: str, seconds: float) -> Kind:
    """A healthy kind that trains for so long, on text and chats that last as well."""
    kind = HEALTHY[name]
    if name in _SHORT:
        return kind
    changes = dict(kind.changes) | {"max_steps": None, "max_hours": seconds / 3600, "eval_steps": "auto"}
    if kind.family is not None:
        changes = {key: value for key, value in changes.items() if key != "eval_steps"}
        return replace(kind, changes=changes, chats=many_chats if kind.chats is None else many_rounds)
    if "save_steps" in changes:
        # Some twenty steps of these models are a second or two: to save so often for long is rightly found.
        changes["save_steps"] = 200
    return replace(kind, changes=changes, text=LONG_TEXT["text"])


def many_chats() -> list[Any]:
    """Sums of all numbers below a hundred and fifty: 22,500 chats."""
    return [
        [{"role": "user", "content": f"What is {a} plus {b}?"}, {"role": "assistant", "content": f"It is {a + b}."}]
        for a in range(150)
        for b in range(150)
    ]


def many_rounds() -> list[Any]:
    """The same, two to a chat."""
    return [[*first, *second] for first, second in pairwise(many_chats())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each healthy run")
    parser.add_argument("--only", choices=("sick", "healthy"))
    parser.add_argument("--from_end", action="store_true", help="the last kind first, beside a process that does not")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    path = RESULTS / "findings.json"
    rows = read_rows(path)
    kinds = {f"sick: {name}": kind for name, kind in DISEASES.items() if given.only != "healthy"}
    kinds |= {f"healthy: {name}": lasting(name, given.seconds) for name in HEALTHY if given.only != "sick"}
    for name in reversed(kinds) if given.from_end else kinds:
        if name not in rows:
            kind = kinds[name]
            row = measure_again_if_paused(kind, name)
            found = set(row["found"])
            # A healthy run may have what the machine has.
            row["is_right"] = kind.finds <= found <= kind.finds | kind.may_find | MACHINE
            rows = read_rows(path) | {name: row}  # the other half may run at the same time
            save_result(path, {"rows": rows, "summary": summarize(rows)})
        print(f"{'ok ' if rows[name]['is_right'] else 'BAD'} {name}: {', '.join(rows[name]['found']) or 'nothing'}")
    print(json.dumps(summarize(rows), indent=1))


def summarize(rows: dict[str, Any]) -> dict[str, Any]:
    """Counts of both halves."""
    sick = [row for name, row in rows.items() if name.startswith("sick")]
    healthy = [row for name, row in rows.items() if name.startswith("healthy")]
    return {
        "sick": len(sick),
        "found": sum(row["is_right"] for row in sick),
        "ids": len({id for row in sick for id in row["found"]}),
        "healthy": len(healthy),
        "without a false alarm": sum(row["is_right"] for row in healthy),
        "of these with a busy machine": sum(bool(row["found"]) and row["is_right"] for row in healthy),
        "seconds of healthy runs": round(sum(row["seconds"] for row in healthy)),
    }


if __name__ == "__main__":
    main()
