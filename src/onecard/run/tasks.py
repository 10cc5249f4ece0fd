"""Tasks by their names, with all they need at hand before anything is measured."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from onecard.errors import InputError
from onecard.evaluation.harness import HarnessSettings, HarnessTask
from onecard.evaluation.ifeval import STANDARD_TOKENS, Checker, read_prompts
from onecard.evaluation.ifeval_task import IFEvalTask
from onecard.evaluation.responses import BATCH_SIZES
from onecard.evaluation.task import Task
from onecard.evaluation.work import Report
from onecard.hardware import Machine
from onecard.planner import find_target, plan_tasks
from onecard.spec import EvalTasksPlan, Plan, Recipe
from onecard.spec.paths import expand

OnItem = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TaskSettings:
    """How tasks other than the loss are measured; `limit` takes the first items, None all of them.

    The last two are for tasks of lm-evaluation-harness, `max_new_tokens` and `ifeval_data` for ifeval.
    """

    limit: int | None = None
    max_new_tokens: int = STANDARD_TOKENS
    batch_size: int = BATCH_SIZES["cpu"]
    ifeval_data: Path | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False


def make_task(name: str, settings: TaskSettings, report: Report | None = None) -> Task:
    """Makes ifeval, or a task of lm-evaluation-harness by its name or file; `report` hears how far it is.

    Raises:
        InputError: its scorer or its data are not on this machine, or cannot be used.
    """
    if name != "ifeval":
        chat, shots = settings.apply_chat_template, settings.num_fewshot
        return HarnessTask(name, HarnessSettings(settings.batch_size, settings.limit, shots, chat), report)
    try:
        checker = Checker()
    except InputError as error:
        try:
            read_prompts(settings.ifeval_data)
        except InputError as other:
            raise InputError(f"{error}\n{other}") from error
        raise
    return IFEvalTask(
        read_prompts(settings.ifeval_data),
        checker,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        limit=settings.limit,
        report=report,
    )


@dataclass(frozen=True)
class RunTask:
    """A task over the fixed part of its items that every checkpoint is scored on, and over all of them."""

    name: str
    part: Task
    whole: Task

    @property
    def is_part(self) -> bool:
        return self.part.num_items < self.whole.num_items


@dataclass
class RunTasks:
    """The tasks of a run; `metric` names the one that says which checkpoint is best, or loss.

    `report` is called while responses are written and may raise to end that.
    """

    metric: str
    tasks: tuple[RunTask, ...] = ()
    report: Report = field(default=lambda done, total: None)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        return tuple(task.whole.fingerprint for task in self.tasks)


def prepare_run_tasks(recipe: Recipe, machine: Machine) -> RunTasks | None:
    """Makes the tasks that score checkpoints of a new run, if any are wanted.

    Raises:
        InputError: a scorer or its data is missing; told before anything else is done.
    """
    return open_run_tasks(recipe, plan_tasks(recipe, find_target(recipe.device, machine).kind, {}))


def open_run_tasks(recipe: Recipe, wanted: EvalTasksPlan | None) -> RunTasks | None:
    """Makes the tasks of a run as its plan says.

    Raises:
        InputError: a scorer or its data is missing, or the items are not those that the run began with.
    """
    if wanted is None:
        return None
    found = RunTasks(wanted.metric)
    data = expand(recipe.ifeval_data) if recipe.ifeval_data else None

    def make(name: str, limit: int | None) -> Task:
        settings = TaskSettings(limit, wanted.max_new_tokens, wanted.batch_size, data)
        return make_task(name, settings, lambda done, total: found.report(done, total))

    try:
        for name in wanted.names:
            part = make(name, wanted.limit)
            found.tasks = (*found.tasks, RunTask(part.name, part, make(name, None)))
            if name == wanted.metric:  # which may be a file
                found.metric = part.name
    except InputError as error:
        raise InputError(
            f"{error}\nThis is for eval_tasks, by which the run would score its checkpoints; without: --eval_tasks none"
        ) from error
    if wanted.data is not None and wanted.data != found.fingerprints:
        raise InputError(
            "the items of eval_tasks have changed since this run began, so its scores could not be compared: restore "
            "ifeval_data, or start a new run"
        )
    return found


def with_facts(plan: Plan, tasks: RunTasks | None) -> Plan:
    """Adds to a plan what is known of its tasks once they are at hand."""
    if plan.eval_tasks is None or tasks is None:
        return plan
    facts = {"num_items": tuple(task.whole.num_items for task in tasks.tasks), "data": tasks.fingerprints}
    return plan.model_copy(update={"eval_tasks": plan.eval_tasks.model_copy(update=facts)})
