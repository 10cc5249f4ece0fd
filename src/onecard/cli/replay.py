"""`onecard replay`."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from onecard.cli.preparation import PreparationProgress
from onecard.cli.recipe_words import JsonOption

if TYPE_CHECKING:
    from onecard.run.replay import ReplayedSample, ReplayedStep


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or latest.")],
    step: Annotated[int, typer.Option(help="The step whose samples are shown.")],
    loss: Annotated[
        bool, typer.Option("--loss", help="Measure each sample with the checkpoint before the step.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Shows the texts that a step was made of, and with --loss what each of them costs."""
    from onecard import api

    progress = PreparationProgress(sys.stderr if as_json else sys.stdout)
    try:
        replayed = api.replay(run, step, with_loss=loss, on_progress=progress)
    finally:
        progress.close()
    if as_json:
        print(json.dumps(_document(replayed), ensure_ascii=False, allow_nan=False))
        return
    for line in _lines(replayed):
        print(line)


def _lines(replayed: "ReplayedStep") -> list[str]:
    recorded = replayed.recorded
    verdict = "" if recorded.is_finite else ", refused"
    lines = [
        f"step {replayed.step}  loss {recorded.loss:g}, gradient norm {recorded.grad_norm:g}{verdict}; "
        f"samples {replayed.position:,} to {replayed.position + len(replayed.samples) - 1:,} of the run"
    ]
    if replayed.weights is not None:
        lines.append(f"losses by the weights of {replayed.weights}, without dropout")
    for number, sample in enumerate(replayed.samples, 1):
        lines += ["", _head(number, sample), _text(sample)]
    return lines


def _head(number: int, sample: "ReplayedSample") -> str:
    loss = "" if sample.loss is None else f", loss {sample.loss:.4f}"
    return f"sample {number}  {sample.source}, {sample.place}: {sample.num_target_tokens:,} targets{loss}"


def _text(sample: "ReplayedSample") -> str:
    """Marks what counts, unless all of it does."""
    some_do_not = any(not counts for _, counts in sample.spans)
    pieces = [f"«{text}»" if counts and some_do_not else text for text, counts in sample.spans]
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in "".join(pieces))


def _document(replayed: "ReplayedStep") -> dict[str, object]:
    document = asdict(replayed)
    # JSON has no word for numbers that are none.
    for part in (document["recorded"], *document["samples"]):
        for key, value in part.items():
            if isinstance(value, float) and value - value != 0:
                part[key] = None
    return document
