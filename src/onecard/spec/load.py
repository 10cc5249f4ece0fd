"""From a name, a file or a mapping, and flags, to a checked Recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onecard.errors import RecipeError
from onecard.spec.dump import plain, values_of
from onecard.spec.layers import DEVICES, Layer, LayerReader
from onecard.spec.merge import difference, merge, settle
from onecard.spec.recipe import Recipe
from onecard.spec.source import Source, read_source
from onecard.spec.spelling import did_you_mean, nearest
from onecard.spec.tasks import defaults, derive


def load_recipe(
    source: str | Path | Mapping[str, Any] | None = None, /, *, require_dataset: bool = True, **overrides: Any
) -> Recipe:
    """Loads a shipped recipe by name, a YAML file, a mapping, or only `overrides` over the defaults.

    Overrides may use any known spelling and win over everything, `on_device` sections included. The chosen size is
    applied and the others are gone; device sections stay, for `apply_device`.

    Raises:
        RecipeError: with every problem of recipe and overrides together.
    """
    problems: list[str] = []
    flags = LayerReader(problems).read(overrides)
    try:
        found = read_source(source)
    except RecipeError as error:
        raise RecipeError(error.origin, [*error.problems, *problems]) from error
    file_problems: list[str] = []
    file = LayerReader(file_problems, found.folder).read(found.settings)
    problems[:0] = file_problems
    recipe = _assemble(found, file, flags, problems)
    if require_dataset and _lacks_dataset(recipe, file, flags):
        problems.append(f"dataset is missing: name {_wanted_data(recipe, file, flags)}")
    if problems or recipe is None:
        raise RecipeError(found.origin, list(dict.fromkeys(problems)))
    return recipe


def apply_device(recipe: Recipe, device: str) -> Recipe:
    """Applies what the recipe says for a device: `cpu`, `cuda` or `cuda:N`.

    The result has no device sections left. Raises RecipeError if the section does not go with the rest.
    """
    kind = device.partition(":")[0]
    problems: list[str] = []
    section = recipe.on_device.get(kind, {})  # type: ignore[call-overload]
    upper = LayerReader(problems).read_device_section(section, f"on_device.{kind}")
    values = settle(merge(values_of(recipe) | {"on_device": {}}, upper, problems), problems)
    applied = _build(values, problems, f"on_device.{kind}: " if section else "")
    if problems or applied is None:
        raise RecipeError(f"recipe {recipe.name}", problems)
    return applied


def _assemble(found: Source, file: Layer, flags: Layer, problems: list[str]) -> Recipe | None:
    """Stacks the layers into a recipe; None if they contradict each other."""
    sizes = file.sizes | flags.sizes
    size = (file.values | flags.values).get("size")
    if size is not None and size not in sizes:
        problems.append(_no_such_size(size, list(sizes)))
        size = None
    layers = [file, sizes[size] if size is not None else Layer(), flags]
    _check_sizes(file, size, problems)
    values = _stack(layers, None, problems)
    values["on_device"] = _device_sections(layers, values, problems)
    values["size"] = size
    # The size is applied; the empty section lets a saved recipe load again without applying it over the flags.
    values["sizes"] = {size: {}} if size is not None else {}
    if found.default_name is not None:
        values.setdefault("name", found.default_name)
    return _build(values, problems)


def _stack(layers: list[Layer], device: str | None, problems: list[str]) -> dict[str, Any]:
    """Merges layers, each followed by its section for `device`."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values, problems)
        if device is not None:
            values = merge(values, layer.on_device.get(device, {}), problems)
    values = derive(values, problems)
    return settle(merge(defaults(values), values, problems), problems)


def _device_sections(layers: list[Layer], values: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Finds what each device changes in the end: what flags have overridden is no change any more."""
    sections = {}
    for device in DEVICES:
        if not any(device in layer.on_device for layer in layers):
            continue
        found: list[str] = []
        section = difference(values, _stack(layers, device, found))
        problems.extend(f"on_device.{device}: {problem}" for problem in found if problem not in problems)
        if section:
            sections[device] = plain(section)
    return sections


def _build(values: Mapping[str, Any], problems: list[str], place: str = "") -> Recipe | None:
    """Makes the recipe, or reports which of its settings contradict one another."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        for entry in error.errors():
            reason = entry.get("ctx", {}).get("error") or f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}"
            problems.extend(place + sentence for sentence in str(reason).splitlines())
        return None


def _check_sizes(file: Layer, chosen: str | None, problems: list[str]) -> None:
    """Reports sizes of the file that contradict the rest of it, also those that this run does not choose.

    Device sections are checked against the rest by `apply_device` alone: a flag must not be refused for the sake of
    a device that is not used.
    """
    known: list[str] = []
    _build(_stack([file], None, known), known)
    for name, section in file.sizes.items():
        if name == chosen:
            continue
        found: list[str] = []
        _build(_stack([file, section], None, found), found)
        problems.extend(f"sizes.{name}: {problem}" for problem in found if problem not in known)


def _lacks_dataset(recipe: Recipe | None, file: Layer, flags: Layer) -> bool:
    if "dataset" in file.refused | flags.refused:
        return False
    if recipe is not None:
        return not recipe.dataset and not any(section.get("dataset") for section in recipe.on_device.values())
    return not (file.values.get("dataset") or flags.values.get("dataset"))


def _wanted_data(recipe: Recipe | None, file: Layer, flags: Layer) -> str:
    task = recipe.task if recipe is not None else derive(file.values | flags.values, []).get("task")
    if task == "sft":
        return "chats: a file of conversations (.jsonl, .json, .parquet), a folder, a glob or a Hub data set"
    return "a text file, a folder, a glob, a Hub data set or python-stdlib"


def _no_such_size(size: str, sizes: list[str]) -> str:
    if not sizes:
        return f"size is {size!r}, but this recipe has no sizes: leave it out"
    return f"size is {size!r}, but the sizes of this recipe are {', '.join(sizes)}{did_you_mean(nearest(size, sizes))}"
