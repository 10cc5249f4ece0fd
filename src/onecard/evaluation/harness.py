"""Any task of lm-evaluation-harness: by its name, or by a YAML file of one's own."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from onecard.errors import InputError
from onecard.evaluation.paired import Items
from onecard.evaluation.responses import name_template
from onecard.evaluation.task import Result, Subject
from onecard.evaluation.work import Report
from onecard.spec import Score

# As the harness seeds what it draws for few-shot examples.
_FEWSHOT_SEED = 1234
_BOOTSTRAPS = 1000
# Aggregations that are means over items, of one number or of a sum and what it is over.
_MEANS = ("mean", "nanmean", "weighted_mean", "weighted_perplexity", "bits_per_byte")
_SUFFIXES = (".yaml", ".yml")
# Tasks that are not of the harness.
_OWN = ("loss", "ifeval")


@dataclass(frozen=True)
class HarnessSettings:
    """How a task is measured: the first `limit` items, as the turns of a chat or plain, with so many examples before.

    `num_fewshot` None: as many as the task says.
    """

    batch_size: int
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False


class HarnessTask:
    """One task of lm-evaluation-harness, or a group of them. Needs the extra `eval`.

    Raises:
        InputError: the package is missing, there is no such task, its data cannot be had, or nothing in it can be
            compared item by item.
    """

    def __init__(self, name: str, settings: HarnessSettings, report: Report | None = None) -> None:
        if find_spec("lm_eval") is None:
            raise InputError(
                f"task {name} is neither loss nor ifeval, so it belongs to lm-evaluation-harness, which cannot be "
                "imported: check the spelling, or install the extra with pip install 'onecard[eval]'"
            )
        self._settings = settings
        self._report = report
        self._tasks = _load(name)
        for task in self._tasks.values():
            if settings.num_fewshot is not None:
                task.set_config(key="num_fewshot", value=settings.num_fewshot)
        self.name = Path(name).stem if name.endswith(_SUFFIXES) else name
        first = next(iter(self._tasks))
        self._metric = _ranking_metric(self._tasks[first], first)
        self._filter = _first_filter(self._tasks[first])
        self.ranks_by = f"{first}/{_label(self._metric, self._filter)}"
        self.is_lower_better = not self._tasks[first].higher_is_better().get(self._metric, True)
        counts = [len(task.eval_docs) for task in self._tasks.values()]
        self.num_items = sum(count if settings.limit is None else min(count, settings.limit) for count in counts)
        documents = [[name, *map(repr, task.eval_docs)] for name, task in self._tasks.items()]
        self.fingerprint = hashlib.sha256(json.dumps(documents).encode("utf-8")).hexdigest()[:16]

    def measure(self, subject: Subject) -> Result:
        """Measures one model."""
        from lm_eval.evaluator import evaluate

        from onecard.evaluation.harness_model import HarnessModel

        settings = self._settings
        for task in self._tasks.values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        model = HarnessModel(subject, settings.batch_size, self._report)
        with _quiet():
            found: dict[str, Any] = evaluate(
                model,
                {"tasks": self._tasks},
                limit=settings.limit,
                bootstrap_iters=_BOOTSTRAPS,
                apply_chat_template=settings.apply_chat_template,
                log_samples=True,
            )
        scores = tuple(score for name in self._tasks for score in self._scores(name, found, subject))
        first = next(iter(self._tasks))
        rows = tuple(
            {"task": name, "doc_id": entry["doc_id"], "responses": entry["filtered_resps"]}
            for name in self._tasks
            for entry in found["samples"][name]
        )
        return Result(
            scores,
            _items([entry for entry in found["samples"][first] if entry["filter"] == self._filter], self._metric),
            rows=rows,
        )

    def _scores(self, name: str, found: dict[str, Any], subject: Subject) -> Iterator[Score]:
        values = found["results"][name]
        protocol = subject.protocol | {
            "task": name,
            "task_version": str(found["versions"].get(name)),
            "data": self.fingerprint,
            "num_fewshot": found["n-shot"].get(name),
            "limit": self._settings.limit,
            "apply_chat_template": self._settings.apply_chat_template,
            "lm_eval": version("lm_eval"),
        }
        if self._settings.apply_chat_template:
            protocol["template"] = name_template(subject.tokenizer)
        for key, value in values.items():
            metric, comma, which = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{which}")
            yield Score(
                name=f"{name}/{_label(metric, which)}",
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                n=int(found["n-samples"][name]["effective"]),
                protocol=protocol,
            )


def _load(name: str) -> dict[str, Any]:
    """Loads a task, or those of a group, by name or from a file; the files of all tasks only where they are needed."""
    from lm_eval.tasks import TaskManager

    path = Path(name).expanduser() if name.endswith(_SUFFIXES) else _file_of(name)
    if path is not None and not path.is_file():
        raise InputError(f"task {name}: there is no such file. Give the name of a task or the path of its YAML file")
    known = list(_OWN)
    try:
        with _quiet():
            manager = TaskManager(include_defaults=path is None)
            known += manager.all_tasks
            tasks: dict[str, Any] = manager.load([str(path) if path is not None else name])["tasks"]
    except KeyError as error:
        raise InputError(
            f"task {name!r} is none of loss, ifeval and lm-evaluation-harness {version('lm_eval')}: "
            f"{_near(name, known)}`lm_eval ls tasks` lists its own; a file ends with .yaml"
        ) from error
    # The harness and datasets raise whatever a file or the network makes them stumble over.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"task {name} cannot be loaded: {reason}. Check its YAML file and where its data lies"
        ) from error
    return tasks


def _near(name: str, known: list[str]) -> str:
    near = get_close_matches(name.lower(), sorted(set(known)), n=3, cutoff=0.75)
    return f"did you mean {' or '.join(near)}? " if near else ""


def _file_of(name: str) -> Path | None:
    """The harness's own file of a plain task, if it bears its name: reading all of them takes seconds."""
    import lm_eval

    for path in Path(lm_eval.__file__).parent.joinpath("tasks").glob(f"**/{name}.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if any(line.split("#")[0].strip() == f"task: {name}" for line in lines):
            return path
    return None


def _ranking_metric(task: Any, name: str) -> str:
    """The first metric that is a mean over items."""
    for metric, aggregate in task.aggregation().items():
        if getattr(aggregate, "__name__", "") in _MEANS:
            return str(metric)
    raise InputError(f"task {name}: none of its metrics is a mean over items, so checkpoints cannot be compared by it")


def _first_filter(task: Any) -> str:
    """The first of the ways in which a task reads answers out of texts: each has a score, and items, of its own."""
    filters = getattr(task.config, "filter_list", None)
    return str(filters[0]["name"]) if filters else "none"


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _items(samples: list[dict[str, Any]], metric: str) -> Items:
    values = [entry[metric] for entry in samples]
    if isinstance(values[0], tuple | list):  # a sum and what it is over: log-likelihood and words or bytes
        return Items(-np.array([pair[0] for pair in values], float), np.array([pair[1] for pair in values]))
    return Items(np.array(values, float), np.ones(len(values), int))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's lines on what it does; errors stay."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
