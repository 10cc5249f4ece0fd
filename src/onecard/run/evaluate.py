"""Scores for the checkpoints of a run, or for one model: which is best, and is that more than chance?"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.checkpoint import list_checkpoints, read_checkpoint, reading, step_of_folder
from onecard.errors import CheckpointError, InputError
from onecard.evaluation.ifeval import STANDARD_TOKENS, Checker, match_responses, read_prompts, score_verdicts
from onecard.evaluation.ifeval_task import ifeval_protocol
from onecard.evaluation.loss_task import HELDOUT, LossTask
from onecard.evaluation.ranking import rank
from onecard.evaluation.responses import BATCH_SIZES
from onecard.evaluation.task import Result, Subject, Task
from onecard.evaluation.text_task import TextLossTask
from onecard.model.folder import load_model_folder
from onecard.model.in_place import load_in_place
from onecard.planner import kind_of
from onecard.report.record import read_rows
from onecard.run.answers import dtype_of
from onecard.run.find import find_folder, find_model_folder, find_run
from onecard.run.folder import RunFolder
from onecard.run.inputs import OnProgress, fetch_base, prepare_inputs
from onecard.run.scores import SCORES, keep_items, keep_responses, protocol_of, record_scores
from onecard.run.tasks import OnItem, TaskSettings, make_task
from onecard.spec import CheckpointScores, Comparison, Evaluation
from onecard.spec.paths import locate
from onecard.training.assemble import DTYPES

# What a pass leaves in a processor's caches: 8,192 tokens at 64 wide take 1.5 times the time of 1,024 (LOG.md).
_CPU_TOKENS_AT_ONCE = 2048
# Blocks of a text in a batch where nobody says: of up to 2,048 tokens.
_BLOCKS_AT_ONCE = 4


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure, of which checkpoints, and how; see `onecard.evaluate`."""

    tasks: tuple[str, ...] = ("loss",)
    checkpoints: str = "all"
    limit: int | None = None
    ifeval_data: Path | None = None
    max_new_tokens: int = STANDARD_TOKENS
    batch_size: int | None = None
    device: str = "cpu"
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    text: Path | None = None

    def check(self) -> None:
        """Refuses values without a meaning.

        Raises:
            InputError: every such value, together.
        """
        problems = []
        if not self.tasks:
            problems.append("no task is given: use loss, ifeval, or one of lm-evaluation-harness")
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} is {value}: give 1 or more")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            problems.append(f"num_fewshot is {self.num_fewshot}: give 0 or more")
        if self.text is not None and "loss" not in self.tasks:
            problems.append("text is what the loss is measured on, but loss is not among the tasks: leave one out")
        if not set(self.tasks) - {"loss", "ifeval"}:
            flags = {"num_fewshot": self.num_fewshot is not None, "apply_chat_template": self.apply_chat_template}
            problems += [
                f"{name} is for tasks of lm-evaluation-harness, and there is none among the tasks: leave it out"
                for name, is_given in flags.items()
                if is_given
            ]
        if problems:
            raise InputError("\n".join(problems))

    def settings(self) -> TaskSettings:
        """The part that concerns tasks which generate."""
        batch_size = self.batch_size or BATCH_SIZES[kind_of(self.device)]
        return TaskSettings(
            self.limit, self.max_new_tokens, batch_size, self.ifeval_data, self.num_fewshot, self.apply_chat_template
        )


@dataclass(frozen=True)
class _Place:
    name: str
    step: int | None
    folder: Path


def evaluate(
    model: str | Path, request: EvaluationRequest, progress: OnProgress | None = None, on_item: OnItem | None = None
) -> Evaluation:
    """Measures checkpoints one after the other, over the same items, and appends their scores to the run's record.

    `progress` hears of text that is prepared, `on_item(what, done, total)` of checkpoints and responses.

    Raises:
        InputError: everything that is known to be wrong, before anything is measured.
    """
    request.check()
    run, places = find_places(model, request.checkpoints)
    tell = on_item or (lambda what, done, total: None)
    tasks = [
        _loss_task(run, request, progress)
        if name == "loss"
        else make_task(name, request.settings(), lambda done, total: tell("responses", done, total))
        for name in dict.fromkeys(request.tasks)
    ]
    measured: dict[str, list[Result]] = {task.name: [] for task in tasks}
    rows: list[CheckpointScores] = []
    loader = _Loader(request.device, _dtype_of(run, request.device))
    with ExitStack() as kept:
        # All of them: a run in training removes old ones, and the last is reached long after the first.
        for place in places:
            kept.enter_context(reading(place.folder))
        for number, place in enumerate(places):
            tell(place.name, number, len(places))
            subject = loader.load(place.folder)
            results = [task.measure(subject) for task in tasks]
            for task, result in zip(tasks, results, strict=True):
                measured[task.name].append(result)
                if run is not None:
                    keep_responses(run.root, f"{task.name}-{place.name}", result)
                    keep_items(run.root, task.name, place.name, result)
            row = CheckpointScores(
                name=place.name, step=place.step, scores=tuple(score for result in results for score in result.scores)
            )
            if run is not None:
                record_scores(run.root, row)
            rows.append(row)
    return _summarize(run, rows, tasks, measured)


def score_responses(responses: Path, ifeval_data: Path | None) -> Evaluation:
    """Scores a file with an IFEval prompt and a response per line; needs no model.

    Raises:
        InputError: the scorer is not installed, or a file cannot be used.
    """
    prompts = read_prompts(ifeval_data)
    pairs = match_responses(responses, prompts)
    checker = Checker()  # last: a mistake in the files is told without its packages, too
    chosen = [prompt for prompt, _ in pairs]
    checker.try_out(chosen)
    protocol = ifeval_protocol(chosen, checker) | {"responses": hashlib.sha256(responses.read_bytes()).hexdigest()[:16]}
    scores, _ = score_verdicts([checker.judge(prompt, text) for prompt, text in pairs], protocol)
    left_out = len(prompts) - len(pairs)
    notes = [f"{left_out:,} of {len(prompts):,} prompts have no response and are left out"] if left_out else []
    row = CheckpointScores(name=str(responses), step=None, scores=scores)
    return Evaluation(checkpoints=(row,), best={}, comparisons=(), notes=tuple(notes))


def find_places(model: str | Path, which: str) -> tuple[RunFolder | None, list[_Place]]:
    """Finds the checkpoints of a run that are meant (all, best, last, or steps with commas), or the one of a model.

    Raises:
        InputError: neither a run nor a model, or no such checkpoints.
        CheckpointError: damaged ones, all of them together.
    """
    path = find_folder(model)
    is_model = any(locate(path / name) for name in ("config.json", "adapter_config.json"))
    is_of_run = path.parent.name == "checkpoints" and locate(path.parent.parent / "plan.json")
    if is_model and not is_of_run:
        return None, [_Place(str(model), None, find_model_folder(path, "best"))]
    run, named = find_run(model)
    if named is not None:
        found = [named]
    elif which == "all":
        found = list_checkpoints(run.checkpoints)
        if not found:
            raise CheckpointError(f"{run.root} has no complete checkpoint yet, so there is nothing to evaluate")
    else:
        words = [word.strip().removeprefix("step-") for word in which.split(",") if word.strip()]
        if not words:
            raise InputError("checkpoints is empty: give all, best, last, or steps with commas, as in 100,200")
        found = sorted({run.find_checkpoint(word) for word in words}, key=step_of_folder)
    problems = []
    for folder in found:
        try:
            read_checkpoint(folder)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join([*problems, "Or evaluate the others by their steps: --checkpoints 100,200"]))
    return run, [_Place(folder.name, step_of_folder(folder), folder) for folder in found]


class _Loader:
    """Loads one checkpoint after the other into the same model where they are of one shape."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def load(self, folder: Path) -> Subject:
        if self._loaded is None or not load_in_place(self._loaded[0], folder):
            self._loaded = None  # two models would not fit
            model, tokenizer = load_model_folder(folder, self._dtype)
            self._loaded = model.to(self._device), tokenizer
        return Subject(*self._loaded, protocol_of(folder, self._dtype, self._device))


def _loss_task(run: RunFolder | None, request: EvaluationRequest, progress: OnProgress | None) -> Task:
    if request.text is not None:
        return TextLossTask(request.text, batch_size=request.batch_size or _BLOCKS_AT_ONCE, limit=request.limit)
    if run is None:
        raise InputError(
            "the held-out loss is measured on the text that a run held out, but this is a model: give the run folder, "
            "a text of your own with --text FILE, or another task, as in --tasks ifeval"
        )
    plan, recipe = run.plan(), run.recipe()
    corpus = prepare_inputs(recipe, fetch_base(recipe, weights=False, progress=progress), progress)
    if not corpus.has_heldout:
        raise InputError(
            f"{run.root} held nothing out (eval_fraction is 0), so it has no text to be measured on: use another task"
        )
    if corpus.fingerprint != plan.corpus.fingerprint:
        raise CheckpointError(
            f"the text of {run.root}, its split or its tokenizer has changed since it began, so what is held out now "
            "may have been trained on: restore the text, or use another task"
        )
    is_at_home = kind_of(plan.device) == kind_of(request.device)
    backend = plan.attn_implementation if is_at_home or plan.attn_implementation != "varlen" else "sdpa"
    batch_size = request.batch_size or plan.eval_batch_size
    if request.batch_size is None and kind_of(request.device) == "cpu":
        batch_size = min(batch_size, max(1, _CPU_TOKENS_AT_ONCE // plan.max_seq_length))
    return LossTask(corpus, plan, batch_size=batch_size, backend=backend, limit=request.limit)


def _dtype_of(run: RunFolder | None, device: str) -> torch.dtype:
    """The precision of the run on its own kind of device; else that of `onecard generate`."""
    plan = run.plan() if run is not None else None
    if plan is not None and kind_of(plan.device) == kind_of(device):
        return DTYPES[plan.precision]
    return dtype_of(device)


def _summarize(
    run: RunFolder | None, rows: Sequence[CheckpointScores], tasks: Sequence[Task], measured: dict[str, list[Result]]
) -> Evaluation:
    best: dict[str, str] = {}
    comparisons: list[Comparison] = []
    notes: list[str] = []
    names = [row.name for row in rows]
    if len(rows) > 1 and _is_picked(run, rows[-1]):
        notes.append(f"note: {names[-1]} is the last of these, not the last of the run")
    for task in tasks:
        results = measured[task.name]
        num_looks = _count_looks(run, rows, task.ranks_by)
        if 1 < len(rows) < num_looks:
            notes.append(f"note: p-values of {task.ranks_by} allow for all {num_looks} checkpoints that were looked at")
        index, found = rank(
            task.ranks_by,
            names,
            [result.items for result in results],
            is_lower_better=task.is_lower_better,
            num_looked_at=num_looks,
            is_last_chosen=_is_picked(run, rows[-1]),
        )
        best[task.ranks_by] = names[index]
        comparisons += found
        notes += [f"{name}: {note}" for name, result in zip(names, results, strict=True) for note in result.notes]
    return Evaluation(checkpoints=tuple(rows), best=best, comparisons=tuple(comparisons), notes=tuple(notes))


def _count_looks(run: RunFolder | None, rows: Sequence[CheckpointScores], score: str) -> int:
    """Counts the checkpoints that a score has been seen of: those measured now, earlier, and by the run itself.

    Two that were picked from a table of a hundred are the outcome of a hundred looks.
    """
    if run is None:
        return len(rows)
    task = rows[0].find(score).protocol.get("task")
    steps = {row.step for row in rows}
    for line in read_rows(run.root / SCORES):
        protocol = line.get("protocol")
        if line.get("name") == score and isinstance(protocol, dict) and protocol.get("task") == task:
            steps.add(line.get("step"))
    if task == HELDOUT:
        steps |= {line.get("step") for line in read_rows(run.events) if line.get("event") == "evaluated"}
    return len(steps)


def _is_picked(run: RunFolder | None, row: CheckpointScores) -> bool:
    """Whether somebody may have picked a checkpoint by its scores: any but the newest of a run."""
    return run is not None and row.step != step_of_folder(list_checkpoints(run.checkpoints)[-1])
