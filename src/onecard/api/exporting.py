"""A trained model as files for other tools."""

from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from onecard.errors import InputError
from onecard.spec.handover import Export, ExportDtype, ExportFormat
from onecard.spec.paths import expand, locate

if TYPE_CHECKING:
    from onecard.run.folder import RunFolder


def export(
    model: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    checkpoint: str = "best",
    output: str | Path | None = None,
) -> Export:
    """Writes a run's checkpoint, or the model of a folder, as a folder that other tools open, and reads it back.

    `to` is hf (transformers), merged (an adapter put into its base), adapter (PEFT) or gguf (llama.cpp, Ollama);
    `dtype` f32, bf16, fp16 or, in GGUF, q8_0. Without `output` it goes to exports/ of the run or the working folder.
    The largest difference of its logits from the trained model's is measured, and appended to the run's exports.jsonl.

    Raises:
        InputError: what cannot be written so; nothing is overwritten.
        CheckpointError: a damaged model, or one that was read back as another than was trained.
    """
    _refuse_unknown(to, dtype)
    format = cast(ExportFormat, to)
    from onecard.checkpoint import reading
    from onecard.handover.export import DEFAULT_DTYPE, ExportRequest
    from onecard.handover.export import export as write
    from onecard.run.find import find_folder, find_model_folder
    from onecard.run.provenance import record_export, trace_model, trace_run

    path = find_folder(model)
    folder = find_model_folder(path, checkpoint)
    run = _run_of(path)
    provenance = trace_run(run, folder) if run else trace_model(folder)
    chosen = cast(ExportDtype, dtype) if dtype else DEFAULT_DTYPE[format]
    target = expand(output) if output is not None else _place(run, provenance.name, folder, f"{format}-{chosen}")
    with reading(folder):
        result = write(ExportRequest(source=folder, output=target, format=format, dtype=chosen), provenance)
    if run:
        record_export(run, result)
    return result


def _refuse_unknown(to: str, dtype: str | None) -> None:
    given = {"--to": (to, get_args(ExportFormat)), "--dtype": (dtype, get_args(ExportDtype))}
    problems = [
        f"{flag} {value!r} does not exist: use {', '.join(known)}"
        for flag, (value, known) in given.items()
        if value is not None and value not in known
    ]
    if problems:
        raise InputError("\n".join(problems))


def _run_of(path: Path) -> "RunFolder | None":
    """The run that a path names, or that the checkpoint it names belongs to."""
    from onecard.run.folder import RunFolder

    root = path.parent.parent if path.parent.name == "checkpoints" else path
    return RunFolder.open(root) if locate(root / "plan.json") and locate(root / "recipe.yaml") else None


def _place(run: "RunFolder | None", name: str, folder: Path, kind: str) -> Path:
    return run.root / "exports" / f"{folder.name}-{kind}" if run else Path("exports") / f"{name}-{kind}"
