"""What a run reads: the model it starts from, and its text or chats; and the plan for them."""

import logging
from collections.abc import Callable
from pathlib import Path

from onecard.checkpoint import is_checkpoint, read_checkpoint
from onecard.data import ChatRequest, CorpusRequest, TrainingData, prepare, prepare_chats
from onecard.errors import InputError
from onecard.hardware import Machine
from onecard.model.generate import check_prompts
from onecard.model.hub import find_base, find_cached
from onecard.model.nf4 import load_operators
from onecard.model.pretrained import check_weights
from onecard.planner import FirstAnswer, Target, facts_of, find_target, make_plan
from onecard.planner.on_cpu import forecast_on_cpu
from onecard.planner.pretrained import find_positions
from onecard.run.find import find_model_folder
from onecard.spec import Plan, Recipe
from onecard.spec.paths import locate

log = logging.getLogger("onecard.run")

OnProgress = Callable[[str, int, int | None], None]


def settle_base(recipe: Recipe) -> Recipe:
    """Makes the folder that a recipe starts from absolute; of a run it is the best checkpoint, which stays as it is."""
    name = recipe.model_name_or_path
    path = locate(name) if name else None
    if path is None or not path.is_dir():
        return recipe
    if (path / "plan.json").is_file() and not (path / "config.json").is_file():
        path = find_model_folder(path, "best")
    return recipe.model_copy(update={"model_name_or_path": str(path.absolute())})


def settle_length(recipe: Recipe) -> Recipe:
    """Takes all positions of the model that a recipe starts from where the default length is more and none was given.

    To be called before the recipe's device section is applied, after which every setting counts as given. A model that
    cannot be used is for `check_recipe` to refuse.
    """
    if recipe.model_name_or_path is None or "max_seq_length" in recipe.model_fields_set:
        return recipe
    try:
        positions = find_positions(settle_base(recipe).model_name_or_path or "")
    except InputError:
        return recipe
    if positions is None or positions >= recipe.max_seq_length:
        return recipe
    return recipe.model_copy(update={"max_seq_length": positions})


def fetch_base(recipe: Recipe, *, weights: bool, progress: OnProgress | None = None) -> Path | None:
    """Gives the folder of the model that a recipe starts from, downloaded if need be; None for one from scratch.

    With `weights` its files are checked as far as that takes seconds: headers, names, shapes, and the hashes of a
    checkpoint.

    Raises:
        InputError: no such model, or it cannot be reached; bitsandbytes is missing.
        CheckpointError: its files are damaged.
    """
    name = recipe.model_name_or_path
    if weights and recipe.method == "qlora":
        load_operators()  # before anything is downloaded or prepared in vain
    if name is None:
        return None
    folder = find_base(name, weights=weights, progress=progress)
    if weights:
        if is_checkpoint(folder):
            read_checkpoint(folder)
        check_weights(folder)
    return folder


def fetch_base_again(recipe: Recipe, plan: Plan, checkpoint: Path | None, progress: OnProgress | None) -> Path | None:
    """Gives the folder of the model that a run started from, to go on with it; its checkpoint where that is enough.

    A run of method full needs nothing of its base that is not in its checkpoints.

    Raises:
        InputError: as `fetch_base`.
    """
    try:
        return fetch_base(recipe, weights=True, progress=progress)
    except InputError as error:
        if checkpoint is None or plan.adapt is not None:
            raise
        log.warning("%s. All weights are in %s, so the run goes on from there", str(error).rstrip("."), checkpoint.name)
        return checkpoint


def find_base_here(recipe: Recipe) -> Path | None:
    """Gives the folder of the model that a recipe starts from where it is on this machine, without its weights."""
    name = recipe.model_name_or_path
    return None if name is None else find_cached(name, weights=False)


def prepare_inputs(recipe: Recipe, base: Path | None, progress: OnProgress | None = None) -> TrainingData:
    """Builds the token files of a recipe's text or chats, or opens those of an earlier call.

    Raises:
        DataError: they cannot be used.
    """
    if recipe.task == "sft":
        return prepare_chats(ChatRequest.of(recipe, base), progress)
    return prepare(CorpusRequest.of(recipe, base), progress)


def plan_inputs(
    recipe: Recipe,
    machine: Machine,
    corpus: TrainingData,
    process_bytes: int,
    first: FirstAnswer | None = None,
    target: Target | None = None,
) -> Plan:
    """Plans a recipe for its prepared text on a machine, with the forecast.

    `process_bytes` are those of `loaded_bytes`, from before anything was prepared. `target` is the machine's device, by
    default for as many processes as were started.

    Raises:
        InputError: something asked for cannot be honoured, the prompts of its samples included.
        DoesNotFitError: nothing that may be chosen fits.
    """
    # Here, not at the first sample: a run must not end over it.
    try:
        check_prompts(corpus.tokenizer, recipe.sample_prompts)
    except InputError as error:
        raise InputError(
            f"{error}\nThese are the recipe's sample_prompts: give some in the language of your text, as in "
            '--sample_prompts "..."'
        ) from error
    target = target or find_target(recipe.device, machine)
    decided = make_plan(recipe, machine, facts_of(corpus), target=target, first=first)
    return forecast_on_cpu(decided, machine, process_bytes, target.group) if decided.device == "cpu" else decided
