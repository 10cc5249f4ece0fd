"""`onecard evaluate`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from onecard.cli.recipe_words import JsonOption
from onecard.errors import InputError

_REPORT_INTERVAL_S = 10.0

RunArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="A run or model folder, a checkpoint, or latest.")
]
TasksOption = Annotated[
    str, typer.Option(help="loss, ifeval, tasks of lm-evaluation-harness by name or YAML file; with commas.")
]
CheckpointsOption = Annotated[str, typer.Option(help="all, best, last, or steps with commas, as in 100,200.")]
LimitOption = Annotated[int | None, typer.Option(help="So many held-out blocks, spread evenly, or the first prompts.")]
ResponsesOption = Annotated[
    Path | None, typer.Option(help='Score this file with {"prompt": …, "response": …} per line; needs no model.')
]
DataOption = Annotated[
    Path | None, typer.Option("--ifeval-data", help="IFEval's input_data.jsonl; without it google/IFEval of the Hub.")
]
TokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Tokens of a response at most; 1280 is the standard.")
]
BatchOption = Annotated[
    int | None, typer.Option("--batch-size", help="Rows at once: changes the speed, not what is measured.")
]

TextOption = Annotated[
    Path | None, typer.Option(help="Measure the loss on this text instead of what a run held out; for any model.")
]
FewshotOption = Annotated[
    int | None, typer.Option("--num-fewshot", help="Examples before each item of a task of the harness.")
]
TemplateOption = Annotated[
    bool, typer.Option("--apply-chat-template", help="Ask tasks of the harness as turns of a chat.")
]


def evaluate(
    run: RunArgument = None,
    tasks: TasksOption = "loss",
    checkpoints: CheckpointsOption = "all",
    limit: LimitOption = None,
    responses: ResponsesOption = None,
    ifeval_data: DataOption = None,
    max_new_tokens: TokensOption = None,
    batch_size: BatchOption = None,
    text: TextOption = None,
    num_fewshot: FewshotOption = None,
    apply_chat_template: TemplateOption = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Scores the checkpoints of a run and says which is best, and whether that is more than chance."""
    if responses is not None and run is not None:
        raise InputError(f"--responses scores a file without a model, but there is {run!r}, too: leave one out")
    if run is None and responses is None:
        raise InputError("give a run folder or a model folder, or --responses FILE")
    from onecard import api
    from onecard.cli.preparation import PreparationProgress

    settings = {
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "ifeval_data": ifeval_data,
        "text": text,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template or None,
    }
    with PreparationProgress(sys.stderr) as progress:
        evaluation = api.evaluate(
            run,
            [name.strip() for name in tasks.split(",") if name.strip()],
            responses=responses,
            device=device,
            on_progress=progress,
            on_item=_Reports(),
            checkpoints=checkpoints,
            **{name: value for name, value in settings.items() if value is not None},
        )
    if as_json:
        print(evaluation.model_dump_json())
        return
    from onecard.cli.evaluation_text import print_evaluation

    print_evaluation(evaluation)


class _Reports:
    """Says on standard error what is being measured, at most once in some seconds."""

    def __init__(self) -> None:
        self._reported_at = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._reported_at < _REPORT_INTERVAL_S:
            return
        self._reported_at = now
        print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)
