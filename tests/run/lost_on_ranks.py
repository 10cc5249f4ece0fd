"""A rank of the tests of lost ones: trains recipes one after the other, one rank of which is slow, killed or hangs.

    python lost_on_ranks.py JOBS.json      with the environment that torchrun would give

A job has `recipe`, `root`, and of rank 1 either `slow_s`, seconds that each of its forward passes takes longer, or, for
the first attempt, `killed_at` or `hangs_at`, a step; of `killed_at` it is the score that is made there.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from light_tasks import make_light_task

import onecard
from onecard.distributed.place import find_place
from onecard.evaluation import work
from onecard.model.decoder import Decoder
from onecard.planner import measure
from onecard.run import tasks
from onecard.training import step as training_step

HANGS_S = 10.0


def fall_ill(job: dict[str, Any]) -> None:
    """Lets this process do what the job says of it."""
    if find_place().rank != 1 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    backward, made = training_step._backward, [0]

    def ill(state: Any, *arguments: Any, **keywords: Any) -> Any:
        made[0] = state.progress.step + 1
        if state.progress.step == job.get("hangs_at"):
            time.sleep(HANGS_S)
        return backward(state, *arguments, **keywords)

    training_step._backward = ill
    respond = work.Continuations.do

    def die(*arguments: Any) -> list[list[int]]:
        if made[0] == job.get("killed_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        return respond(*arguments)

    work.Continuations.do = die
    if "slow_s" in job:
        make = Decoder.__init__

        def make_slow(self: Decoder, *arguments: Any, **keywords: Any) -> None:
            make(self, *arguments, **keywords)
            call = self._call

            def slow(**keywords: Any) -> Any:
                time.sleep(job["slow_s"])
                return call(**keywords)

            self._call = slow

        Decoder.__init__ = make_slow


def main() -> None:
    faulthandler.dump_traceback_later(float(os.environ.get("ENDS_AFTER_S", "110")), exit=True)
    measure._PEAK_SIZE["cpu"] = 64
    tasks.make_task = make_light_task
    make, backward = Decoder.__init__, training_step._backward
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        Decoder.__init__, training_step._backward = make, backward
        fall_ill(job)
        onecard.train(onecard.load_recipe(job["recipe"]), output_dir=job["root"])


if __name__ == "__main__":
    main()
