"""From what a user names to a run, a checkpoint or a model."""

import json
from pathlib import Path

from onecard.checkpoint import is_checkpoint, read_checkpoint
from onecard.errors import InputError
from onecard.report.record import newest_run
from onecard.run.folder import RunFolder
from onecard.spec import Recipe
from onecard.spec.paths import expand, locate, make_absolute


def find_folder(name: str | Path) -> Path:
    """The folder that a user names; `latest` is the run under runs/ that was written to last."""
    return newest_run(Path("runs")) if str(name) == "latest" else expand(name)


def find_run(run: str | Path) -> tuple[RunFolder, Path | None]:
    """Finds the folder of a run and, where one is named, the checkpoint."""
    path = find_folder(run)
    if path.parent.name == "checkpoints":
        folder = RunFolder.open(path.parent.parent)
        return folder, folder.find_checkpoint(path.name.removeprefix("step-"))
    return RunFolder.open(path), None


# Settings that say where a run is and who watches it, not what it computes.
_MAY_DIFFER = {
    "name",
    "description",
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "report_to",
    "logging_steps",
} | {"max_restarts"}


def differences_of(own: Recipe, recipe: Recipe) -> list[str]:
    """Says in which settings that count a recipe is not the one of a run."""
    own, recipe = make_absolute(own), make_absolute(recipe)
    return [
        f"{Recipe.model_fields[key].alias or key}: {getattr(own, key)} in the run, {getattr(recipe, key)} now"
        for key in Recipe.model_fields
        if key not in _MAY_DIFFER and getattr(own, key) != getattr(recipe, key)
    ]


def refuse_other_settings(recipe: Recipe, folder: RunFolder) -> None:
    """Refuses to continue a run under another recipe than its own.

    Raises:
        InputError: with every difference.
    """
    differences = [f"  {line}" for line in differences_of(folder.recipe(), recipe)]
    if differences:
        raise InputError(
            "\n".join([f"{folder.root} was started with other settings:", *differences])
            + f"\nContinue it as it is with `onecard resume {folder.root}`, or start a new run without --resume"
        )


def has_chat_template(folder: Path) -> bool:
    """Says whether the tokenizer in a model folder has a chat template, without loading it."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def find_model_folder(path: Path, checkpoint: str) -> Path:
    """Finds the model folder that a path stands for: itself, or a checkpoint (best, last, a step) of a run.

    Raises:
        InputError: neither a model nor a run, or no such checkpoint.
        CheckpointError: the checkpoint is damaged.
    """
    is_model = any(locate(path / name) for name in ("config.json", "adapter_config.json"))
    if not is_model and locate(path) and not locate(path / "plan.json"):
        raise InputError(
            f"{path} is neither a model nor a run: it has no config.json, and no plan.json and recipe.yaml. Give the "
            "folder of a model or of a run; those lie under runs/ by default"
        )
    folder = path if is_model else RunFolder.open(path).find_checkpoint(checkpoint)
    if is_checkpoint(folder):
        read_checkpoint(folder)  # refuses damaged weights; any other model folder has no hashes to compare
    return folder
