"""Training, from its beginning or from where it stood."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.api.here import (
    OnProgress,
    apply_its_device,
    keep_memory_for_steps,
    make_cublas_deterministic,
    probe_here,
)
from onecard.distributed.place import find_place, is_follower
from onecard.errors import InputError
from onecard.spec import Plan, Recipe
from onecard.spec.paths import expand

if TYPE_CHECKING:
    from onecard.observe.events import Event
    from onecard.run.folder import RunFolder
    from onecard.run.verify import Verification

OnEvent = Callable[["Event"], None]
OnPlan = Callable[[Plan, Path], None]


def train(
    recipe: Recipe,
    *,
    output_dir: str | Path | None = None,
    resume: str | Path | None = None,
    on_event: OnEvent | None = None,
    on_plan: OnPlan | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Trains a recipe in a new run folder and returns that folder.

    `resume` names a run folder, a checkpoint or `latest`: that run goes on by its own recipe; another is refused.
    `on_plan(plan, run_folder)` is called once before the first step, `on_event(event)` at everything that happens.

    Raises:
        InputError, DoesNotFitError: as `plan`, by the same forecast; nothing is overwritten.
        DivergedError: update after update had to be refused, or a finding stopped the run, whose record is whole.
    """
    from onecard.distributed.meeting import meeting

    asked = {**recipe.model_dump(mode="json"), "resume": str(resume)}
    if is_follower():
        return _follow(asked, on_progress)
    with meeting().led(asked):
        if begun := _find_begun(output_dir):
            return _continue(begun, None, on_event, on_plan, on_progress)
        return _train(recipe, output_dir, resume, on_event, on_plan, on_progress)


def _find_begun(output_dir: str | Path | None = None) -> "RunFolder | None":
    """The run of the processes that torchrun has started these in the place of."""
    from onecard.distributed.meeting import meeting
    from onecard.run.folder import RunFolder

    root = meeting().recall(output_dir)
    folder = None if root is None else RunFolder(root)
    return folder if folder is not None and folder.is_whole else None


def _train(
    recipe: Recipe,
    output_dir: str | Path | None,
    resume: str | Path | None,
    on_event: OnEvent | None,
    on_plan: OnPlan | None,
    on_progress: OnProgress | None,
) -> Path:
    from onecard.distributed.meeting import meeting
    from onecard.observe.sinks import check_targets
    from onecard.planner import check_recipe, loaded_bytes
    from onecard.run.folder import RunFolder, free_folder
    from onecard.run.inputs import fetch_base, plan_inputs, prepare_inputs, settle_base, settle_length
    from onecard.run.outcome import compare
    from onecard.run.reporting import reported
    from onecard.run.session import run_session
    from onecard.run.tasks import prepare_run_tasks, with_facts

    machine, process_bytes = probe_here(), loaded_bytes()
    recipe = settle_base(apply_its_device(settle_length(recipe), machine))
    if wish := resume or recipe.resume_from_checkpoint:
        folder, checkpoint = _find_same_run(recipe, "latest" if wish is True else wish, output_dir)
        meeting().remember(folder.root, output_dir)
        return _continue(folder, checkpoint, on_event, on_plan, on_progress)
    if given := output_dir or recipe.output_dir:
        RunFolder.refuse_taken(expand(given))
    check_targets(recipe.report_to)
    check_recipe(recipe, machine)
    tasks = prepare_run_tasks(recipe, machine)
    base = fetch_base(recipe, weights=True, progress=on_progress)
    corpus = prepare_inputs(recipe, base, on_progress)
    decided = with_facts(plan_inputs(recipe, machine, corpus, process_bytes), tasks)
    root = expand(given) if given else free_folder(Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    meeting().remember(root, output_dir)
    folder = RunFolder.create(root, recipe, decided, corpus.audit)
    with folder.lock(), folder.discarded_unless_begun():
        if on_plan is not None:
            on_plan(decided, root)
        with reported(folder):
            ending = run_session(folder, corpus, None, on_event, tasks)
            compare(folder, machine, ending.steps)
    ending.refuse_divergence()
    return root


def _find_same_run(recipe: Recipe, run: str | Path, output_dir: str | Path | None) -> "tuple[RunFolder, Path | None]":
    from onecard.run.find import find_run, refuse_other_settings

    folder, checkpoint = find_run(run)
    if output_dir is not None and Path(output_dir).absolute() != folder.root.absolute():
        raise InputError(f"output_dir {output_dir} is not the run that is resumed, {folder.root}: leave it out")
    refuse_other_settings(recipe, folder)
    return folder, checkpoint


def resume(
    run: str | Path,
    *,
    accept: Sequence[str] = (),
    on_event: OnEvent | None = None,
    on_plan: OnPlan | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Continues a run from its newest whole checkpoint, or from the checkpoint folder given, and returns its folder.

    `accept` names what may have changed since: data, tokenizer, recipe, card. The record is cut back to the checkpoint.
    On a CPU, and with `deterministic: true` on a GPU, the result equals that of an uninterrupted run bit for bit, on a
    machine of the same kind: the run keeps its number of threads.

    Raises:
        InputError: no such run, damaged checkpoints, changes that are not accepted, or a folder in use.
        DivergedError: as `train`; a run that a finding has stopped ends there again.
    """
    from onecard.distributed.meeting import meeting
    from onecard.run.changes import check_names
    from onecard.run.find import find_run

    asked = {"resume": str(run)}
    if is_follower():
        return _follow(asked, on_progress)
    with meeting().led(asked):
        accepted = check_names(accept)
        if begun := _find_begun():
            folder, checkpoint = begun, None
        else:
            folder, checkpoint = find_run(run)
            meeting().remember(folder.root, None)
        return _continue(folder, checkpoint, on_event, on_plan, on_progress, accepted)


def _follow(asked: dict[str, Any], on_progress: OnProgress | None) -> Path:
    """Trains as the leading process says, which has read the recipe or the run."""
    from onecard.run.following import follow

    keep_memory_for_steps()
    return follow(asked, on_progress)


def verify(run: str | Path, num_steps: int = 10, *, on_progress: OnProgress | None = None) -> "Verification":
    """Repeats steps of a run from one of its checkpoints and compares them with its record; writes nothing into it.

    `run` names a run or one of its checkpoints; without one, the newest that so many recorded steps follow.

    Raises:
        InputError: no such run, no recorded steps after its checkpoints, or changed text.
        DoesNotFitError: there is no memory for it.
    """
    from onecard.run.find import find_run
    from onecard.run.verify import verify_run

    folder, checkpoint = find_run(run)
    _set_up(folder.plan(checkpoint))
    return verify_run(folder, checkpoint, num_steps, on_progress)


def _set_up(plan: Plan) -> None:
    """Lets this process compute as that of a run did; refuses a device that is not here."""
    from onecard.planner import choose_device

    if plan.deterministic:
        make_cublas_deterministic()
    choose_device(plan.device, probe_here())
    if plan.device == "cpu":
        keep_memory_for_steps()


def _continue(
    folder: "RunFolder",
    checkpoint: Path | None,
    on_event: OnEvent | None,
    on_plan: OnPlan | None,
    on_progress: OnProgress | None,
    accepted: frozenset[str] = frozenset(),
) -> Path:
    from onecard.planner.ranks import share_out
    from onecard.run.changes import check_circumstances, settle_corpus
    from onecard.run.inputs import fetch_base_again, prepare_inputs
    from onecard.run.reporting import reported
    from onecard.run.session import run_session
    from onecard.run.tasks import open_run_tasks

    with folder.lock():
        checkpoint = checkpoint or folder.find_resumable()
        decided = folder.plan(checkpoint)
        _set_up(decided)
        check_circumstances(folder, checkpoint, decided, accepted)
        recipe = folder.recipe()
        tasks = open_run_tasks(recipe, decided.eval_tasks)
        base = fetch_base_again(recipe, decided, checkpoint, on_progress)
        corpus = prepare_inputs(recipe, base, on_progress)
        corpus, decided = settle_corpus(recipe, decided, corpus, checkpoint, accepted)
        num_ranks = find_place().num_ranks
        decided = share_out(decided, recipe, num_ranks)
        if decided.forecast is not None and decided.forecast.num_ranks != num_ranks:
            decided = decided.model_copy(update={"forecast": None})  # it was for another number
        if on_plan is not None:
            on_plan(decided, folder.root)
        with reported(folder):
            ending = run_session(folder, corpus, checkpoint, on_event, tasks, decided)
    ending.refuse_divergence()
    return folder.root
