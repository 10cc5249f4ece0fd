"""What the record of a run tells of where its model comes from."""

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from onecard.checkpoint import step_of_folder
from onecard.errors import InputError
from onecard.model.hub import find_cached
from onecard.report.record import read_object, read_rows
from onecard.run.folder import RunFolder
from onecard.run.versions import onecard_version, package_version
from onecard.spec import CheckpointScores, DatasetSource, Score, recipe_to_yaml
from onecard.spec.handover import UNKNOWN, DataRecord, Export, Provenance
from onecard.spec.paths import locate, shorten_path, shorten_paths

_EXPORTS, _SCORES = "exports.jsonl", "scores.jsonl"
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "gguf")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def trace_run(run: RunFolder, checkpoint: Path) -> Provenance:
    """Collects what a run knows of one of its checkpoints. Hashes the files of its data as they are now."""
    recipe, plan = run.recipe(), run.plan(checkpoint)
    base = plan.model.base
    evaluated = _evaluated(run, step_of_folder(checkpoint))
    return Provenance(
        name=run.root.absolute().name,
        checkpoint=checkpoint.name,
        step=step_of_folder(checkpoint),
        method="pretrain" if plan.task == "pretrain" and base is None else recipe.method,
        base=shorten_path(base.name) if base else None,
        base_fingerprint=base.fingerprint if base else None,
        base_license=_license_of(find_cached(base.name)) if base else UNKNOWN,
        data=tuple(_data_record(source) for source in recipe.dataset),
        corpus_fingerprint=plan.corpus.fingerprint,
        tokens_seen=read_object(checkpoint / "progress.json").get("tokens_seen"),
        heldout_loss=evaluated.get("loss"),
        bits_per_byte=evaluated.get("bits_per_byte"),
        best_step=run.best_step(),
        recipe=shorten_paths(recipe_to_yaml(recipe)),
        scores=_scores(run, checkpoint.name),
        versions=_versions(),
    )


def trace_model(folder: Path) -> Provenance:
    """The little that a folder tells of a model that no run is known of."""
    return Provenance(name=folder.absolute().name, versions=_versions())


def record_export(run: RunFolder, export: Export) -> None:
    """Appends what was written, with its difference from what was trained, to the run's exports.jsonl."""
    with (run.root / _EXPORTS).open("a", encoding="utf-8", newline="\n") as file:
        file.write(export.model_dump_json() + "\n")


def _evaluated(run: RunFolder, step: int) -> dict[str, Any]:
    """The held-out loss of a step as the run measured it; empty where it did not."""
    found = [row for row in read_rows(run.events) if row.get("event") == "evaluated" and row.get("step") == step]
    return found[-1] if found else {}


def _scores(run: RunFolder, checkpoint: str) -> CheckpointScores | None:
    """The newest of each score that was recorded for a checkpoint."""
    newest: dict[str, Score] = {}
    for row in read_rows(run.root / _SCORES):
        if row.get("checkpoint") == checkpoint:
            score = Score.model_validate({key: row.get(key) for key in Score.model_fields})
            newest[score.name] = score
    if not newest:
        return None
    return CheckpointScores(name=checkpoint, step=int(checkpoint.rsplit("-", 1)[-1]), scores=tuple(newest.values()))


def _data_record(source: DatasetSource) -> DataRecord:
    try:
        path = locate(source.path)
    except InputError:  # not to be looked at by this user
        path = None
    if path is None:
        return DataRecord(name=source.path)
    return DataRecord(name=path.name, sha256=_hash(path), license=_license_of(path if path.is_dir() else path.parent))


def _hash(path: Path) -> str | None:
    """SHA-256 of a file; of a folder, that of the lines `hash  name` of its files, as sha256sum prints them."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        names = sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file())
        lines = "".join(f"{_hash(path / name)}  {name}\n" for name in names)
    except OSError:
        return None
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def _license_of(folder: Path | None) -> str:
    """The licence that the front matter of a folder's README.md names, as the Hub's model and data cards do."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8") if folder is not None else ""
        found = _FRONT_MATTER.match(text.replace("\r\n", "\n"))
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return UNKNOWN
    stated = values.get("license_name") or values.get("license") if isinstance(values, dict) else None
    return str(stated) if isinstance(stated, str) else UNKNOWN


def _versions() -> dict[str, str]:
    return {"onecard": onecard_version()} | {name: package_version(name) for name in _PACKAGES}
