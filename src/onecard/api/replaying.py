"""A step of a run, looked at again."""

from pathlib import Path
from typing import TYPE_CHECKING

from onecard.api.here import OnProgress, probe_here

if TYPE_CHECKING:
    from onecard.run.replay import ReplayedStep


def replay(
    run: str | Path, step: int, *, with_loss: bool = False, on_progress: OnProgress | None = None
) -> "ReplayedStep":
    """Shows the samples that a step of a run was made of: text, source, place; finished or in training.

    `with_loss` measures each of them with the newest checkpoint from before the step, on the device of the run. Takes
    no lock and changes nothing in the run.

    Raises:
        InputError: no such run or step, or its text has changed.
    """
    from onecard.planner import choose_device
    from onecard.report.record import read_runs
    from onecard.run.find import find_run
    from onecard.run.inputs import fetch_base, prepare_inputs
    from onecard.run.replay import find_step, replay_step

    folder, _ = find_run(run)
    (record,) = read_runs([folder.root])
    find_step(record, step)  # before anything is prepared
    plan, recipe = folder.plan(), folder.recipe()
    if with_loss:
        choose_device(plan.device, probe_here())
    corpus = prepare_inputs(recipe, fetch_base(recipe, weights=with_loss, progress=on_progress), on_progress)
    return replay_step(folder, plan, corpus, record, step, with_loss=with_loss)
