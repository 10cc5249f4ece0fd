"""A run folder as it lies there, whoever wrote it: settings, events, scores. Nothing is locked, nothing is written."""

import glob
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from onecard.errors import CheckpointError, InputError, OnecardError
from onecard.observe.events import EvaluatedEvent, Event, FindingEvent, FinishedEvent, StepEvent
from onecard.observe.lines import parse_event
from onecard.spec import Plan, Recipe, apply_device, load_recipe
from onecard.spec.paths import expand, locate
from onecard.spec.plan import explain_refusal

VERSIONS = "versions.jsonl"
_PLAN, _RECIPE, _EVENTS, _SCORES, _MARK = "plan.json", "recipe.yaml", "events.jsonl", "scores.jsonl", "best.json"
# Items of a task and what a model made of them: as kept by a run in training, and by `onecard evaluate`.
_ITEM_FOLDERS = ("evaluations", "items")

Kind = TypeVar("Kind", bound=Event)


@dataclass(frozen=True)
class StoredItems:
    """What a model of a run made of each item of a task; `scores` are the rows that were computed from them."""

    scores: tuple[dict[str, Any], ...]
    sums: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True)
class VersionsLine:
    """What software a run went on with after `step`, by the names of packages."""

    step: int
    versions: dict[str, str]


@dataclass(frozen=True)
class RunRecord:
    """All that a run has written down. `recipe` is None where it cannot be read; `age_s` is since the last event."""

    root: Path
    plan: Plan
    recipe: Recipe | None
    events: tuple[Event, ...]
    num_damaged: int
    age_s: float | None
    card: str | None
    marked_step: int | None
    score_rows: tuple[dict[str, Any], ...]
    versions: tuple[VersionsLine, ...] = ()

    def of(self, kind: type[Kind]) -> list[Kind]:
        """The events of a kind, in their order."""
        return [event for event in self.events if isinstance(event, kind)]

    @cached_property
    def steps(self) -> list[StepEvent]:
        return self.of(StepEvent)

    @cached_property
    def evaluated(self) -> list[EvaluatedEvent]:
        return self.of(EvaluatedEvent)

    @property
    def findings(self) -> list[FindingEvent]:
        return self.of(FindingEvent)

    def items_of(self, checkpoint: str) -> Iterator[StoredItems]:
        """Reads what was kept of the items of tasks for a checkpoint: a file for each task and protocol."""
        for folder in _ITEM_FOLDERS:
            for path in sorted((self.root / folder).glob(f"*-{glob.escape(checkpoint)}.json")):
                content = read_object(path)
                try:
                    scores = tuple(dict(score) for score in content["scores"])
                    yield StoredItems(scores, *(tuple(map(float, content[name])) for name in ("sums", "counts")))
                except (KeyError, TypeError, ValueError):  # half written
                    continue

    @property
    def finished(self) -> FinishedEvent | None:
        """How the run ended; None for one that has not, or that goes on after it was stopped."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, FinishedEvent) else None


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """Reads run folders, each once; patterns are expanded, for not every shell does that.

    Raises:
        InputError: everything that is no run folder, or cannot be read, together.
    """
    found: list[RunRecord] = []
    problems: list[str] = []
    for path in dict.fromkeys(folder.absolute() for text in paths for folder in _expanded(text)):
        try:
            found.append(_read_run(path))
        except OnecardError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{error.filename or path}: {error.strerror}. Check what it is, and who may read it")
    if problems:
        raise InputError("\n".join(problems))
    return found


def newest_run(root: Path) -> Path:
    """The run folder under `root` that was written to last.

    Raises:
        InputError: there is none.
    """
    found = [path.parent for path in root.glob(f"*/{_PLAN}")]
    if not found:
        raise InputError(f"no run folder under {root}: start one with `onecard train RECIPE`")
    return max(found, key=lambda path: (path / _EVENTS).stat().st_mtime if (path / _EVENTS).exists() else 0)


def find_record(run: str | Path) -> RunRecord:
    """Reads the run that a user names: its folder, one of its checkpoints, or latest.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = newest_run(Path("runs")) if str(run) == "latest" else expand(run)
    return read_runs([path.parent.parent if path.parent.name == "checkpoints" else path])[0]


def _expanded(text: str | Path) -> list[Path]:
    path = expand(text)
    if "*" in str(text) and locate(path) is None:
        found = sorted(entry.parent for entry in path.parent.glob(f"{path.name}/{_PLAN}"))
        if not found:
            raise InputError(
                f"{text}: there is no run folder of such a name; check it, they lie under runs/ by default"
            )
        return found
    return [path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()]


def _read_run(root: Path) -> RunRecord:
    if not locate(root / _PLAN) or root.parent.name == "checkpoints":
        raise InputError(_no_run(root))
    plan = _read_plan(root / _PLAN)
    events, num_damaged = _read_events(root / _EVENTS)
    outcome = read_object(root / "outcome.json")
    card = outcome.get("card") or (plan.forecast.card if plan.forecast is not None else None)
    step = read_object(root / _MARK).get("step")
    return RunRecord(
        root=root,
        plan=plan,
        recipe=_read_recipe(root / _RECIPE, plan.device),
        events=events,
        num_damaged=num_damaged,
        age_s=max(0.0, time.time() - (root / _EVENTS).stat().st_mtime) if events else None,
        card=card,
        marked_step=step if isinstance(step, int) else None,
        score_rows=tuple(read_rows(root / _SCORES)),
        versions=read_versions(root),
    )


def _no_run(root: Path) -> str:
    if not locate(root):
        return f"{root} is no run folder: it does not exist. Run folders lie under runs/ by default"
    inside = sorted(path.parent.name for path in root.glob(f"*/{_PLAN}") if path.parent.parent.name != "checkpoints")
    if inside and root.name != "checkpoints":
        return f"{root} is no run folder, but holds {len(inside)}: give them, as in {root / '*'}"
    parents = [parent for parent in root.parents if (parent / _PLAN).is_file() and (parent / _RECIPE).is_file()]
    if parents:
        return f"{root} is a part of a run: give the run itself, {parents[0]}"
    return f"{root} is no run folder: it has no {_PLAN}. Run folders lie under runs/ by default"


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{path} cannot be read as a plan ({explain_refusal(error)}): leave this run out, or copy the "
            "plan.json of one of its checkpoints over it"
        ) from error


def _read_recipe(path: Path, device: str) -> Recipe | None:
    try:
        return apply_device(load_recipe(path, require_dataset=False), device)
    except (OnecardError, OSError):  # the plan has nearly all that it says
        return None


def _read_events(path: Path) -> tuple[tuple[Event, ...], int]:
    """Reads a record and counts the lines that are no events; one that is still being written is none of them."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return (), 0
    events: list[Event] = []
    num_damaged = 0
    for line in lines:
        try:
            events.append(parse_event(line.decode("utf-8")))
        except (CheckpointError, UnicodeDecodeError):
            num_damaged += 1
    if num_damaged and not events:
        raise CheckpointError(
            f"{path} cannot be read as the record of a run: none of its {num_damaged:,} lines is an event. Restore it, "
            "or delete it to do without"
        )
    return tuple(events), num_damaged


def read_versions(root: Path) -> tuple[VersionsLine, ...]:
    """Reads what software a run was made with; nothing of one that was begun before this was written down."""
    rows = [row for row in read_rows(root / VERSIONS) if isinstance(row.get("versions"), dict)]
    return tuple(
        VersionsLine(row["step"], {str(name): str(number) for name, number in row["versions"].items()})
        for row in rows
        if isinstance(row.get("step"), int)
    )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Reads the objects of a record of a run, one a line; none where there is no such file."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the line that a process was killed in
            continue
        if isinstance(row, dict):
            yield row


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object that a run has written; an empty one where there is none, or only half of it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
