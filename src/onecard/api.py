"""What the commands call, and other people's code too."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.errors import InputError
from onecard.spec import Alternative, Evaluation, Plan, Recipe
from onecard.spec.load import apply_device, load_recipe
from onecard.spec.paths import expand

if TYPE_CHECKING:
    from onecard.data import TrainingData
    from onecard.hardware import Machine
    from onecard.observe.events import Event
    from onecard.run.folder import RunFolder

__all__ = ["alternatives", "evaluate", "generate", "is_chat_model", "load_recipe", "plan", "prepare", "resume", "train"]

OnProgress = Callable[[str, int, int | None], None]
OnEvent = Callable[["Event"], None]
OnPlan = Callable[[Plan, Path], None]


def prepare(recipe: Recipe, *, progress: OnProgress | None = None) -> "TrainingData":
    """Builds tokenizer and token files of a recipe, or opens those of an earlier call; of chats, with their audit.

    `progress` gets a stage, bytes done and bytes in all (None where unknown).

    Raises:
        DataError: the text cannot be used; the message names file and place.
    """
    from onecard.run.inputs import fetch_base, prepare_inputs, settle_base

    recipe = settle_base(_on_its_device(recipe, _machine()))
    return prepare_inputs(recipe, fetch_base(recipe, weights=False, progress=progress), progress)


def plan(
    recipe: Recipe,
    *,
    card: str | None = None,
    platform: str | None = None,
    progress: OnProgress | None = None,
    on_draft: Callable[[Plan], None] | None = None,
    refine: bool = True,
) -> Plan:
    """Decides everything that training would do, each with its reason, and predicts its memory and time.

    Without `card` the plan is for this machine, and the text is prepared for it. With one (`rtx-4060-laptop`; see
    `onecard cards`) it is for that card on `platform` (linux, linux-headless or windows), needs no GPU, and takes the
    text as it is: its size is estimated unless it has been prepared before.

    Seconds for an eager plan, up to a minute for a compiled one that is new. Then `on_draft` gets the plan with the
    forecast of its eager step first (`forecast.is_refined` false); without `refine` that is the answer.

    Raises:
        InputError: something asked for cannot be honoured.
        DoesNotFitError: nothing that may be chosen fits the card; the message says what would.
    """
    from onecard.hardware import find_card
    from onecard.observe.sinks import check_targets
    from onecard.planner import FirstAnswer, check_recipe, make_plan, survey_facts, target_of_card
    from onecard.planner.on_cpu import forecast_on_cpu, loaded_bytes
    from onecard.run.inputs import fetch_base, find_base_here, plan_inputs, prepare_inputs, settle_base

    machine, recipe = _machine(), settle_base(recipe)
    first = FirstAnswer(on_draft or (lambda _: None), is_refined=refine)
    if card is None:
        if platform is not None:
            raise InputError("--platform belongs to --card: without a card the plan is for this machine")
        process_bytes = loaded_bytes()
        recipe = _on_its_device(recipe, machine)
        check_targets(recipe.report_to)
        check_recipe(recipe, machine)
        base = fetch_base(recipe, weights=False, progress=progress)
        decided = plan_inputs(recipe, machine, prepare_inputs(recipe, base, progress), first)
        return forecast_on_cpu(decided, machine, process_bytes) if decided.device == "cpu" else decided
    target = target_of_card(find_card(card), platform)
    recipe = apply_device(recipe, "cuda")
    check_recipe(recipe, machine, target)
    return make_plan(recipe, machine, survey_facts(recipe, find_base_here(recipe)), target=target, first=first)


def alternatives(plan: Plan, *, card: str | None = None, platform: str | None = None) -> Iterator[Alternative]:
    """Forecasts a plan for a GPU with one thing changed at a time, a row as soon as it is known.

    Raises:
        InputError: the plan is for a CPU.
    """
    from onecard.hardware import find_card
    from onecard.planner import find_target, list_alternatives, target_of_card

    if plan.forecast is None or plan.device == "cpu":
        raise InputError("alternatives are forecast for GPUs: name a card, as in --card rtx-4060-laptop")
    target = target_of_card(find_card(card), platform) if card else find_target(plan.device, _machine())
    return list_alternatives(plan, target)


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
    from onecard.run.find import find_run, refuse_other_settings
    from onecard.run.folder import RunFolder, free_folder
    from onecard.run.inputs import fetch_base, plan_inputs, prepare_inputs, settle_base
    from onecard.run.outcome import compare
    from onecard.run.session import run_session

    machine = _machine()
    recipe = settle_base(_on_its_device(recipe, machine))
    if wish := resume or recipe.resume_from_checkpoint:
        folder, checkpoint = find_run("latest" if wish is True else wish)
        if output_dir is not None and Path(output_dir).absolute() != folder.root.absolute():
            raise InputError(f"output_dir {output_dir} is not the run that is resumed, {folder.root}: leave it out")
        refuse_other_settings(recipe, folder)
        return _continue(folder, checkpoint, on_event, on_plan, on_progress)
    if given := output_dir or recipe.output_dir:
        RunFolder.refuse_taken(expand(given))
    check_targets(recipe.report_to)
    check_recipe(recipe, machine)
    base = fetch_base(recipe, weights=True, progress=on_progress)
    corpus = prepare_inputs(recipe, base, on_progress)
    decided = plan_inputs(recipe, machine, corpus)
    root = expand(given) if given else free_folder(Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = RunFolder.create(root, recipe, decided, corpus.audit)
    with folder.lock(), folder.discarded_unless_begun():
        if on_plan is not None:
            on_plan(decided, root)
        steps = run_session(folder, corpus, None, on_event)
        compare(folder, machine, steps)
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
    of an uninterrupted run bit for bit, on a machine of the same kind: the run keeps its number of threads.

    Raises:
        InputError: no such run, damaged checkpoints, changed text, or a folder in use.
    """
    from onecard.run.find import find_run

    folder, checkpoint = find_run(run)
    return _continue(folder, checkpoint, on_event, on_plan, on_progress)


def is_chat_model(model: str | Path, *, checkpoint: str = "best") -> bool:
    """Says whether a run's checkpoint or a folder of a model has a chat template, so that `generate` answers prompts.

    Raises:
        InputError: no such model.
    """
    from onecard.run.find import find_model_folder, has_chat_template

    return has_chat_template(find_model_folder(expand(model), checkpoint))


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
    chat: bool | None = None,
) -> list[str]:
    """Completes prompts with a run's checkpoint, or any folder of a model or adapter; gives them without their prompts.

    With `chat` each prompt is a user's turn and is answered; by default where the tokenizer has a chat template.
    `temperature` 0 takes the likeliest token. `checkpoint` is best, last or a step number, for a run folder.

    Raises:
        InputError: no such model, or sampling values without a meaning.
    """
    from onecard.model.generate import Sampling, check_prompts, complete
    from onecard.planner import choose_device
    from onecard.run.answers import answer, load_for_use

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    sampling.check()
    if not prompts:
        raise InputError("no prompt is given")
    chosen, _ = choose_device(device, _machine())
    loaded, tokenizer = load_for_use(expand(model), checkpoint, chosen)
    check_prompts(tokenizer, prompts)
    write = answer if chat or (chat is None and tokenizer.chat_template) else complete
    return write(loaded, tokenizer, prompts, sampling)


def evaluate(
    model: str | Path | None = None,
    tasks: Sequence[str] = ("loss",),
    *,
    responses: str | Path | None = None,
    ifeval_data: str | Path | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
    on_item: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> Evaluation:
    """Scores the checkpoints of a run, or a model, and says which is best; or scores a file of `responses` to IFEval.

    `tasks` are loss (over the text or chats that the run held out) and ifeval. `settings` are `checkpoints` (all, best,
    last, or steps with commas), `limit` (held-out blocks, prompts), `max_new_tokens` and `batch_size`. Scores of a run
    are appended to its scores.jsonl.

    Raises:
        InputError: everything that is known to be wrong, before anything is measured.
    """
    from onecard.planner import choose_device
    from onecard.run.evaluate import EvaluationRequest, score_responses
    from onecard.run.evaluate import evaluate as measure

    data = expand(ifeval_data) if ifeval_data is not None else None
    if responses is not None:
        return score_responses(expand(responses), data)
    if model is None:
        raise InputError("give a run, a model, or a file of responses")
    chosen, _ = choose_device(device, _machine())
    request = EvaluationRequest(tasks=tuple(tasks), ifeval_data=data, device=chosen, **settings)
    return measure(model, request, on_progress, on_item)


def _continue(
    folder: "RunFolder",
    checkpoint: Path | None,
    on_event: OnEvent | None,
    on_plan: OnPlan | None,
    on_progress: OnProgress | None,
) -> Path:
    from onecard.planner import choose_device
    from onecard.run.inputs import fetch_base, prepare_inputs
    from onecard.run.session import run_session

    with folder.lock():
        checkpoint = checkpoint or folder.find_resumable()
        decided = folder.plan(checkpoint)
        if decided.deterministic:
            _make_cublas_deterministic()
        choose_device(decided.device, _machine())  # refuses one that is not here
        recipe = folder.recipe()
        base = fetch_base(recipe, weights=True, progress=on_progress)
        corpus = prepare_inputs(recipe, base, on_progress)
        if on_plan is not None:
            on_plan(decided, folder.root)
        run_session(folder, corpus, checkpoint, on_event)
    return folder.root


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
