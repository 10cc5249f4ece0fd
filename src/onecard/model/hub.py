"""Existing models by name: a local folder, the Hugging Face Hub, or ModelScope."""

from pathlib import Path
from onecard.errors import InputError


def find_base(name: str, *, weights: bool = True, progress=None) -> Path:
    p = Path(name)
    if not p.is_dir():
        raise InputError(f"{name}?")
    return p
