"""A trained model in use, and what it is worth."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onecard.api.here import OnProgress, probe_here
from onecard.errors import DataError, InputError
from onecard.spec import Evaluation
from onecard.spec.paths import expand


def is_chat_model(model: str | Path, *, checkpoint: str = "best") -> bool:
    """Says whether a run's checkpoint or a folder of a model has a chat template, so that `generate` answers prompts.

    Raises:
        InputError: no such model.
    """
    from onecard.run.find import find_folder, find_model_folder, has_chat_template

    return has_chat_template(find_model_folder(find_folder(model), checkpoint))


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
    from onecard.run.find import find_folder

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    sampling.check()
    if not prompts:
        raise InputError("no prompt is given")
    chosen, _ = choose_device(device, probe_here())
    loaded, tokenizer = load_for_use(find_folder(model), checkpoint, chosen)
    check_prompts(tokenizer, prompts)
    if not (chat or (chat is None and tokenizer.chat_template)):
        return complete(loaded, tokenizer, prompts, sampling)
    try:
        return answer(loaded, tokenizer, prompts, sampling)
    except DataError as error:
        raise InputError(f"{error} To let the model go on with the text instead: --plain (chat=False)") from error


def evaluate(
    model: str | Path | None = None,
    tasks: Sequence[str] = ("loss",),
    *,
    responses: str | Path | None = None,
    on_progress: OnProgress | None = None,
    on_item: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> Evaluation:
    """Scores the checkpoints of a run, or a model, and says which is best; or scores a file of `responses` to IFEval.

    `tasks` are loss (over the text or chats that the run held out), ifeval, and those of lm-evaluation-harness by name
    or YAML file. `settings` are those of `EvaluationRequest`: `checkpoints` (all, best, last, or steps with commas),
    `limit` (held-out blocks, prompts, items), `ifeval_data`, `max_new_tokens`, `batch_size`, `device`, `num_fewshot`,
    `apply_chat_template`, `text` (a file for the loss). Scores of a run are appended to its scores.jsonl.

    Raises:
        InputError: everything that is known to be wrong, before anything is measured.
    """
    from onecard.planner import choose_device
    from onecard.run.evaluate import EvaluationRequest, score_responses
    from onecard.run.evaluate import evaluate as measure

    settings |= {key: expand(settings[key]) for key in ("ifeval_data", "text") if settings.get(key) is not None}
    if responses is not None:
        return score_responses(expand(responses), settings.get("ifeval_data"))
    if model is None:
        raise InputError("give a run, a model, or a file of responses")
    device, _ = choose_device(settings.pop("device", "auto"), probe_here())
    return measure(model, EvaluationRequest(tasks=tuple(tasks), device=device, **settings), on_progress, on_item)
