"""Shapes of the models that recipes start from, as facts of the package."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from onecard.model.hub import MODELSCOPE


@dataclass(frozen=True)
class KnownModel:
    """A model by its settings, as its config has them; `download_bytes` None: not known, so to be computed."""

    names: tuple[str, ...]
    source: str
    settings: dict[str, Any]
    dtype: str
    download_bytes: int | None = None


def find_known_model(name: str) -> KnownModel | None:
    """Finds a model by any of its names on the Hugging Face Hub or ModelScope, whatever the case."""
    return _by_name().get(name.removeprefix(MODELSCOPE).lower())


@cache
def _by_name() -> dict[str, KnownModel]:
    text = files("onecard.planner").joinpath("known_models.toml").read_text(encoding="utf-8")
    models = [KnownModel(**entry | {"names": tuple(entry["names"])}) for entry in tomllib.loads(text)["models"]]
    return {name.lower(): model for model in models for name in model.names}
