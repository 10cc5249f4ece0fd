"""Paths in a recipe file: relative to where the user stands, else to the file itself."""

from pathlib import Path
from typing import Any

from onecard.spec.accepts import MODEL_CONFIG

_TRAINED_TOKENIZERS = ("bpe", "char", "bytes")


def anchor(key: str, value: Any, folder: Path | None) -> Any:
    """Makes paths of a value absolute where they exist beside the recipe file and not in the current directory."""
    if folder is None:
        return value
    if key in ("dataset", "eval_dataset"):
        return tuple(source.model_copy(update={"path": _anchored(source.path, folder)}) for source in value)
    if key == MODEL_CONFIG and isinstance(value, str):
        return _anchored(value, folder)
    if key == "tokenizer" and value not in _TRAINED_TOKENIZERS:
        return _anchored(value, folder)
    return value


def _anchored(path: str, folder: Path) -> str:
    if not path or Path(path).is_absolute() or _exists(path, Path()) or not _exists(path, folder):
        return path
    # Joined and not resolved: a glob's characters must stay as they are.
    return str(folder.absolute() / path)


def _exists(path: str, folder: Path) -> bool:
    try:
        return (folder / path).exists() or any(True for _ in folder.glob(path))
    except (OSError, ValueError):  # no path at all, such as text with a null character or a misplaced **
        return False
