"""Paths in a recipe: relative to where the user stands, else to the recipe's file; absolute once a run has them."""

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard.errors import InputError
from onecard.spec.accepts import MODEL_CONFIG
from onecard.spec.recipe import Recipe

STDLIB = "python-stdlib"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Values of keys that may also hold a path.
_WORDS = ("bpe", "char", "bytes", "auto", "default", "chatml", "eos")


def locate(path: str | Path) -> Path | None:
    """Finds the file or folder that a text names, `~` included; None where there is none or can be none.

    Raises:
        InputError: something is there, but may not be looked at.
    """
    try:
        found = expand(path)
        return found if found.exists() else None
    except PermissionError as error:
        raise InputError(f"{path}: {error.strerror}. Check who may read it") from error
    except OSError:  # longer than a file system's names
        return None


def expand(path: str | Path) -> Path:
    """Replaces `~`; the home of an unknown user stays as it is written."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def shorten_path(path: str) -> str:
    """A name as it is; of a folder on this machine its last part, for where it lies is nobody's business."""
    return Path(path).name if Path(path).is_absolute() else path


def shorten_paths(recipe: str) -> str:
    """Shortens the absolute paths in a recipe's YAML to their last part."""
    lines = (re.fullmatch(r"(.*?[-:] )(.*)", line) for line in recipe.splitlines())
    pairs = zip(recipe.splitlines(), lines, strict=True)
    return "\n".join(line if found is None else found[1] + shorten_path(found[2]) for line, found in pairs)


def is_hub_name(text: str) -> bool:
    """Says whether a text can name a data set or a model on the Hugging Face Hub: `name` or `owner/name`."""
    return _HUB_NAME.fullmatch(text) is not None


def anchor(key: str, value: Any, folder: Path | None) -> Any:
    """Makes paths of a value absolute where they exist beside the recipe file and not in the current directory."""
    if folder is None:
        return value
    return _with_paths(key, value, lambda path: _anchored(path, folder))


def make_absolute(recipe: Recipe) -> Recipe:
    """Makes every local path of a recipe absolute, so that it means the same from another working folder.

    Names of the Hub, and paths where nothing is, stay as they are. Applied twice it changes nothing more.
    """
    changes = {
        name: _with_paths(field.alias or name, getattr(recipe, name), _absolute)
        for name, field in Recipe.model_fields.items()
    }
    return recipe.model_copy(update=changes)


def _with_paths(key: str, value: Any, change: Callable[[str], str]) -> Any:
    """Changes the paths in the value of a key; values of keys that hold none are returned as they are."""
    if key in ("dataset", "eval_dataset"):
        return tuple(
            source if source.path == STDLIB else source.model_copy(update={"path": change(source.path)})
            for source in value
        )
    is_path = key in ("tokenizer", "chat_template") and value not in _WORDS
    if key == "ifeval_data" and value is not None:
        return change(value)
    if key == "eval_tasks":
        return tuple(change(name) if name.endswith((".yaml", ".yml")) else name for name in value)
    is_model = key in (MODEL_CONFIG, "model_name_or_path") and isinstance(value, str)
    return change(value) if is_path or is_model else value


def _anchored(path: str, folder: Path) -> str:
    if not path or Path(path).is_absolute() or _exists(path, Path()) or not _exists(path, folder):
        return path
    # Joined and not resolved: a glob's characters must stay as they are.
    return str(folder.absolute() / path)


def _absolute(path: str) -> str:
    if found := locate(path):
        return str(found.absolute())
    return str(Path.cwd() / expand(path)) if glob.has_magic(path) else path


def _exists(path: str, folder: Path) -> bool:
    if locate(folder / path):
        return True
    try:
        return any(True for _ in folder.glob(path))
    except (OSError, ValueError, NotImplementedError):  # no path at all, an absolute one, or a misplaced **
        return False
