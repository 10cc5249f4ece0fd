"""Prepares or times settings in a process of its own, which may hang or die: `python -m onecard.api.bench_worker JOB`.

JOB is a JSON file, as `onecard.trials.bench` writes it; each answer is one line of JSON on stdout.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onecard.api.here import apply_its_device, probe_here
from onecard.errors import DataError, DoesNotFitError, OnecardError
from onecard.spec import Plan, Recipe, load_recipe


def main(job_file: Path) -> None:
    """Does what a job asks for: `check` answers once for each of its settings, `time` once."""
    # Libraries print: what they say must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for answer in work(json.loads(job_file.read_text(encoding="utf-8"))):
        print(json.dumps(answer), file=answers, flush=True)


def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Does a job and yields an answer for each of its settings."""
    for overrides in job["settings"]:
        try:
            recipe = _settled(load_recipe(job["source"], require_dataset=False, **overrides))
            if job["does"] == "check":
                yield {"is_synthetic": _check(recipe, may_be_synthetic=job["may_be_synthetic"])}
            else:
                yield _time(recipe, job)
        except OnecardError as error:
            yield {"error": str(error), "does_not_fit": isinstance(error, DoesNotFitError)}


def _settled(recipe: Recipe) -> Recipe:
    from onecard.run.inputs import settle_base, settle_length

    return settle_base(apply_its_device(settle_length(recipe), probe_here()))


def _check(recipe: Recipe, *, may_be_synthetic: bool) -> bool:
    """Refuses what cannot be honoured and prepares the text; says whether random tokens have to stand in for it."""
    from onecard.planner import check_recipe
    from onecard.run.inputs import fetch_base, prepare_inputs
    from onecard.trials.synthetic import lacks_data

    check_recipe(recipe, probe_here())
    base = fetch_base(recipe, weights=True)
    try:
        prepare_inputs(recipe, base)
    except DataError:
        if may_be_synthetic and lacks_data(recipe):
            return True
        raise
    return False


def _time(recipe: Recipe, job: dict[str, Any]) -> dict[str, Any]:
    from onecard.planner import loaded_bytes
    from onecard.run.inputs import fetch_base, prepare_inputs
    from onecard.run.session import explained_device_loss, explained_memory
    from onecard.trials.timing import time_setting

    process_bytes = loaded_bytes()
    base = fetch_base(recipe, weights=True)
    corpus = None if job["is_synthetic"] else prepare_inputs(recipe, base)
    if job["plan"] is not None:
        plan = Plan.model_validate(job["plan"])
    else:
        plan = _plan(recipe, corpus, base, process_bytes)
    import torch

    with explained_memory(), explained_device_loss(torch.device(plan.device)):
        timing = time_setting(plan, corpus, job["seconds"])
    return {"plan": plan.model_dump(mode="json"), "timing": timing.as_dict()}


def _plan(recipe: Recipe, corpus: Any, base: Path | None, process_bytes: int) -> Plan:
    from onecard.planner import make_plan
    from onecard.planner.on_cpu import forecast_on_cpu
    from onecard.run.inputs import plan_inputs
    from onecard.trials.synthetic import synthetic_facts

    if corpus is not None:
        return plan_inputs(recipe, probe_here(), corpus, process_bytes)
    plan = make_plan(recipe, probe_here(), synthetic_facts(recipe, base))
    return forecast_on_cpu(plan, probe_here(), process_bytes) if plan.device == "cpu" else plan


if __name__ == "__main__":
    main(Path(sys.argv[1]))
