"""A rank of the tests of whole runs: does one job after the other with the other ranks.

    python runs_on_ranks.py JOBS.json      with the environment that torchrun would give

A job trains a recipe in a new folder, or resumes the run that is there; `dies_at`: a rank and the step at which its
process ends without a word. `taken_back`: another run, resumed from a copy of it without the checkpoints after a step.
"""

import faulthandler
import json
import os
import shutil
import sys
from pathlib import Path

from light_tasks import make_light_task

import onecard
from onecard.distributed.place import find_place
from onecard.planner import measure
from onecard.run import tasks
from onecard.training import step as training_step

HOW_IT_DIES = 77


def die_at(rank: int, step: int) -> None:
    """Lets this process end in the middle of a step, if it is that rank."""
    update, made = training_step.StepStats, [0]

    def count(*values: object) -> training_step.StepStats:
        made[0] += 1
        if made[0] == step and find_place().rank == rank:
            os._exit(HOW_IT_DIES)
        return update(*values)  # type: ignore[arg-type]

    training_step.StepStats = count  # type: ignore[assignment, misc]


def take_back(whole: Path, last_step: int, root: Path) -> None:
    """Makes a folder what that of a run was after a step."""
    shutil.copytree(whole, root)
    for folder in (root / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > last_step:
            shutil.rmtree(folder)


def main() -> None:
    faulthandler.dump_traceback_later(float(os.environ["ENDS_AFTER_S"]), exit=True)
    measure._PEAK_SIZE["cpu"] = 64
    tasks.make_task = make_light_task
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if job.get("dies_at"):
            die_at(*job["dies_at"])
        if taken := job.get("taken_back"):
            if find_place().is_leader:
                take_back(Path(taken[0]), taken[1], Path(job["root"]))
            onecard.resume(job["root"])
        elif Path(job["root"]).exists():
            onecard.resume(job["root"])
        else:
            onecard.train(onecard.load_recipe(job["recipe"]), output_dir=job["root"])


if __name__ == "__main__":
    main()
