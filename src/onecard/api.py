"""What the commands call, and other people's code too."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.errors import InputError
from onecard.spec import CorpusFacts, Plan, Recipe
from onecard.spec.load import apply_device, load_recipe
from onecard.spec.paths import expand, locate, make_absolute

if TYPE_CHECKING:
    from onecard.data import Corpus
    from onecard.hardware import Machine
    from onecard.observe.events import Event
    from onecard.run.folder import RunFolder

__all__ = ["generate", "load_recipe", "plan", "prepare", "resume", "train"]

OnProgress = Callable[[str, int, int | None], None]
OnEvent = Callable[["Event"], None]
OnPlan = Callable[[Plan, Path], None]


def prepare(recipe: Recipe, *, progress: OnProgress | None = None) -> "Corpus":
    """Builds tokenizer and token files of a recipe, or opens those of an earlier call.

    `progress` gets a stage, bytes done and bytes in all (None where unknown).

    Raises:
        DataError: the text cannot be used; the message names file and place.
    """
    return _prepare(_on_its_device(recipe, _machine()), progress)


def plan(recipe: Recipe, *, progress: OnProgress | None = None) -> Plan:
    """Decides everything that training would do on this machine, each with its reason; prepares the text for it.

    Raises:
        InputError: something asked for cannot be honoured.
    """
    from onecard.planner import check_recipe

    machine = _machine()
    recipe = _on_its_device(recipe, machine)
    check_recipe(recipe, machine)
    return _plan(recipe, machine, _prepare(recipe, progress))


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

    `resume` names a run folder, a checkpoint folder or `latest`; the run then goes on under its own recipe and
    plan, and a recipe that asks for something else is refused.
    `on_plan(plan, run_folder)` is called once before the first step, `on_event(event)` at everything that happens.

    Raises:
        InputError: input that cannot work, nothing is overwritten.
        DivergedError: training cannot go on.
    """
    from onecard.observe.sinks import check_targets
    from onecard.planner import check_recipe
    from onecard.run.folder import RunFolder
    from onecard.run.session import run_session

    machine = _machine()
    recipe = _on_its_device(recipe, machine)
    if wish := resume or recipe.resume_from_checkpoint:
        folder, checkpoint = _find_run("latest" if wish is True else wish)
        if output_dir is not None and Path(output_dir).absolute() != folder.root.absolute():
            raise InputError(f"output_dir {output_dir} is not the run that is resumed, {folder.root}: leave it out")
        _refuse_other_settings(recipe, folder)
        return _continue(folder, checkpoint, on_event, on_plan, on_progress)
    root = Path(output_dir or recipe.output_dir or Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    root = expand(root)
    check_targets(recipe.report_to)
    check_recipe(recipe, machine)
    corpus = _prepare(recipe, on_progress)
    decided = _plan(recipe, machine, corpus)
    folder = RunFolder.create(root, recipe, decided)
    with folder.lock(), folder.discarded_unless_begun():
        if on_plan is not None:
            on_plan(decided, root)
        run_session(folder, corpus, None, on_event)
    return root


def resume(
    run: str | Path,
    *,
    on_event: OnEvent | None = None,
    on_plan: OnPlan | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Continues a run from its newest whole checkpoint, or from the checkpoint folder given, and returns its folder.

    The record is cut back to the checkpoint. On a CPU, and with `deterministic: true` on a GPU, the result equals that
    of an uninterrupted run bit for bit.

    Raises:
        InputError: no such run, damaged checkpoints, changed text, or a folder in use.
    """
    folder, checkpoint = _find_run(run)
    return _continue(folder, checkpoint, on_event, on_plan, on_progress)


def generate(
    model: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    checkpoint: str = "best",
    device: str = "auto",
) -> list[str]:
    """Completes prompts with a run's checkpoint, or any folder of a model or adapter; gives them without their prompts.

    `temperature` 0 takes the likeliest token. `checkpoint` is best, last or a step number, for a run folder.

    Raises:
        InputError: no such model, or sampling values without a meaning.
    """
    import torch

    from onecard.model.folder import load_model_folder
    from onecard.model.generate import Sampling, check_prompts, complete
    from onecard.planner import choose_device, kind_of

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    sampling.check()
    if not prompts:
        raise InputError("no prompt is given")
    chosen, _ = choose_device(device, _machine())
    if kind_of(chosen) == "cpu":
        dtype = torch.float32
    else:
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(chosen) >= (8, 0) else torch.float16
    loaded, tokenizer = load_model_folder(_model_folder(expand(model), checkpoint), dtype)
    check_prompts(tokenizer, prompts)
    return complete(loaded.to(chosen), tokenizer, prompts, sampling)


def _find_run(run: str | Path) -> "tuple[RunFolder, Path | None]":
    """Finds the folder of a run and, where one is named, the checkpoint."""
    from onecard.run.folder import RunFolder, newest_run

    path = newest_run(Path("runs")) if str(run) == "latest" else expand(run)
    if path.parent.name == "checkpoints":
        folder = RunFolder.open(path.parent.parent)
        return folder, folder.find_checkpoint(path.name.removeprefix("step-"))
    return RunFolder.open(path), None


def _continue(
    folder: "RunFolder",
    checkpoint: Path | None,
    on_event: OnEvent | None,
    on_plan: OnPlan | None,
    on_progress: OnProgress | None,
) -> Path:
    from onecard.planner import choose_device
    from onecard.run.session import run_session

    with folder.lock():
        checkpoint = checkpoint or folder.find_resumable()
        decided = folder.plan(checkpoint)
        if decided.deterministic:
            _make_cublas_deterministic()
        choose_device(decided.device, _machine())  # refuses one that is not here
        corpus = _prepare(folder.recipe(), on_progress)
        if on_plan is not None:
            on_plan(decided, folder.root)
        run_session(folder, corpus, checkpoint, on_event)
    return folder.root


# Settings that say where a run is and who watches it, not what it computes.
_MAY_DIFFER = {"name", "description", "output_dir", "run_name", "resume_from_checkpoint", "report_to", "logging_steps"}


def _refuse_other_settings(recipe: Recipe, folder: "RunFolder") -> None:
    own, recipe = make_absolute(folder.recipe()), make_absolute(recipe)
    differences = [
        f"  {Recipe.model_fields[key].alias or key}: {getattr(own, key)} in the run, {getattr(recipe, key)} now"
        for key in Recipe.model_fields
        if key not in _MAY_DIFFER and getattr(own, key) != getattr(recipe, key)
    ]
    if differences:
        raise InputError(
            "\n".join([f"{folder.root} was started with other settings:", *differences])
            + f"\nContinue it as it is with `onecard resume {folder.root}`, or start a new run without --resume"
        )


def _model_folder(path: Path, checkpoint: str) -> Path:
    from onecard.checkpoint import is_checkpoint, read_checkpoint
    from onecard.run.folder import RunFolder

    is_model = any(locate(path / name) for name in ("config.json", "adapter_config.json"))
    folder = path if is_model else RunFolder.open(path).find_checkpoint(checkpoint)
    if is_checkpoint(folder):
        read_checkpoint(folder)  # refuses damaged weights; any other model folder has no hashes to compare
    return folder


def _machine() -> "Machine":
    from onecard.hardware import probe_machine

    return probe_machine()


def _on_its_device(recipe: Recipe, machine: "Machine") -> Recipe:
    """Applies the recipe's section for the device it will run on."""
    if recipe.deterministic:
        _make_cublas_deterministic()
    from onecard.planner import choose_device, kind_of

    device, _ = choose_device(recipe.device, machine)
    return apply_device(recipe, "cpu" if kind_of(device) == "cpu" else "cuda")


def _make_cublas_deterministic() -> None:
    # Read once, at the first matrix product of the process, which is the planner's.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _prepare(recipe: Recipe, progress: OnProgress | None) -> "Corpus":
    from onecard.data import CorpusRequest, Source
    from onecard.data import prepare as prepare_corpus

    def sources(items: Sequence[Any]) -> tuple[Source, ...]:
        return tuple(Source(**item.model_dump()) for item in items)

    request = CorpusRequest(
        sources=sources(recipe.dataset),
        eval_sources=sources(recipe.eval_dataset),
        tokenizer=recipe.tokenizer,
        vocab_size=recipe.vocab_size,
        eval_fraction=recipe.eval_fraction,
        eval_split=recipe.eval_split,
        num_proc=None if recipe.dataset_num_proc == "auto" else recipe.dataset_num_proc,
    )
    return prepare_corpus(request, progress)


def _plan(recipe: Recipe, machine: "Machine", corpus: "Corpus") -> Plan:
    from onecard.model.generate import check_prompts
    from onecard.planner import make_plan

    # Here, not at the first sample: a run must not end over it.
    check_prompts(corpus.tokenizer, recipe.sample_prompts)
    facts = CorpusFacts(**{name: getattr(corpus, name) for name in CorpusFacts.model_fields})
    return make_plan(recipe, machine, facts)
