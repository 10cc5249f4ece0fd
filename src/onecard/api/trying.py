"""Short trainings that answer a question."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.api.here import OnProgress, apply_its_device, probe_here
from onecard.errors import InputError
from onecard.spec import Recipe
from onecard.spec.paths import expand

if TYPE_CHECKING:
    from onecard.trials.bench import Bench
    from onecard.trials.rates import Budget, RateSearch
    from onecard.trials.short_runs import Trial

DEFAULT_RECIPE = "demo"
BENCH_MINUTES = FIND_LR_MINUTES = 10.0
_NO_LIMIT = 10**5


def bench(
    source: str | Path | None = None,
    *,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    minutes: float = BENCH_MINUTES,
    on_progress: Callable[[str], None] | None = None,
    **overrides: Any,
) -> "Bench":
    """Times a recipe on this machine, with each combination of the values in `sweep`; writes nothing.

    Every setting runs in processes of its own, which take turns for about so many minutes, preparation apart. Without
    a source the recipe is `demo`; where its text is not here, random tokens stand in, and the rows say so.

    Raises:
        InputError: a setting that cannot be honoured, all of them together.
    """
    from onecard.trials.bench import Workers
    from onecard.trials.bench import bench as run_bench
    from onecard.trials.sweep import check_settings, list_settings

    _check_minutes(minutes)
    if source is None and not overrides.get("dataset"):
        source = DEFAULT_RECIPE
    settings = list_settings(sweep or {})
    check_settings(source, overrides, settings)
    workers = Workers(None if source is None else str(source), overrides)
    return run_bench(workers, settings, minutes, on_progress or (lambda text: None))


def find_lr(
    recipe: Recipe,
    *,
    minutes: float = FIND_LR_MINUTES,
    output_dir: str | Path | None = None,
    on_budget: "Callable[[Budget], None] | None" = None,
    on_trial: "Callable[[Trial], None] | None" = None,
    on_progress: OnProgress | None = None,
) -> "tuple[RateSearch, Path]":
    """Proposes a learning rate for a recipe from short whole runs; gives the search and the folder of its evidence.

    Runs share text, order, batch and held-out tokens; a second seed shows what is chance. The folder is
    find-lr/<recipe>-<time> by default, and is made before the first run; nothing is overwritten.

    Raises:
        InputError: as `train`; too few minutes; nothing is held out; the folder is not empty.
    """
    from onecard.planner import check_recipe, loaded_bytes
    from onecard.run.inputs import fetch_base, plan_inputs, prepare_inputs, settle_base, settle_length
    from onecard.run.session import explained_memory
    from onecard.trials.evidence import Evidence
    from onecard.trials.rates import find_rate

    _check_minutes(minutes)
    machine, process_bytes = probe_here(), loaded_bytes()
    recipe = settle_base(apply_its_device(settle_length(recipe), machine))
    root = expand(output_dir) if output_dir else Path("find-lr") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    Evidence.refuse_taken(root)
    check_recipe(recipe, machine)
    base = fetch_base(recipe, weights=True, progress=on_progress)
    corpus = prepare_inputs(recipe, base, on_progress)
    plan = plan_inputs(recipe, machine, corpus, process_bytes)
    evidence = Evidence.create(root, recipe, plan)

    def hear(trial: "Trial") -> None:
        evidence.add(trial)
        if on_trial is not None:
            on_trial(trial)

    try:
        with explained_memory():
            search = find_rate(plan, corpus, minutes, on_budget or (lambda budget: None), hear)
    finally:
        evidence.discard_if_empty()
    return search, root


def keep_result(folder: Path, document: Mapping[str, Any]) -> None:
    """Writes the answer of `find_lr` into the folder of its evidence."""
    with (folder / "result.json").open("x", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def _check_minutes(minutes: float) -> None:
    if not 0 < minutes <= _NO_LIMIT:
        raise InputError(f"minutes {minutes:g}: give a number above 0, such as {BENCH_MINUTES:g}")
