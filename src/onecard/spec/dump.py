"""A recipe taken apart again: values by key, and YAML that loads to the same recipe."""

from collections.abc import Mapping
from typing import Any

import yaml

from onecard.spec.accepts import FIELDS, MODEL_CONFIG, default_of
from onecard.spec.agreement import DEPENDENCES
from onecard.spec.recipe import DatasetSource, Recipe

_FIELD_NAMES = {key: "model_settings" if key == MODEL_CONFIG else key for key in FIELDS}


def recipe_to_yaml(recipe: Recipe) -> str:
    """Writes a recipe as YAML that loads to an equal one; defaults are written out, so that it keeps its meaning.

    What has no effect beside the other settings is left out.
    """
    idle = {key for row in DEPENDENCES if not row.holds(vars(recipe)) for key in row.keys}
    values = {
        key: value
        for key, value in values_of(recipe).items()
        if not (value in (None, (), {}, "") and value == default_of(key))
        and not (key in idle and value == default_of(key))
    }
    return yaml.dump(plain(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Takes a recipe apart into values by key."""
    return {key: getattr(recipe, name) for key, name in _FIELD_NAMES.items()}


def plain(value: Any) -> Any:
    """Turns a valid value into what YAML can hold: lists, mappings, text and numbers."""
    if isinstance(value, DatasetSource):
        given = value.model_dump(exclude_defaults=True)
        return given["path"] if set(given) == {"path"} else given
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


class _Dumper(yaml.SafeDumper):
    """Writes Unicode's rare line ends escaped: PyYAML by itself writes them raw and reads them back as newlines."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(end in text for end in ("\x85", "\u2028", "\u2029")) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
