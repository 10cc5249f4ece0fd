"""From a name, a file or a mapping, and flags, to a checked Recipe."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onecard.errors import RecipeError
from onecard.spec.dump import plain, plain_layer, values_of
from onecard.spec.layers import DEVICES, Layer, LayerReader
from onecard.spec.merge import difference, merge, settle
from onecard.spec.recipe import Recipe
from onecard.spec.source import Source, read_source
from onecard.spec.spelling import did_you_mean, nearest


def load_recipe(
    source: str | Path | Mapping[str, Any] | None = None, /, *, require_dataset: bool = True, **overrides: Any
) -> Recipe:
    """Loads a shipped recipe by name, a YAML file, a mapping, or only `overrides` over the defaults.

    Overrides may use any known spelling and win over everything, `on_device` sections included. The chosen size is
    applied; device sections stay, for `apply_device`.

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
        problems.append("dataset is missing: name a text file, a folder, a glob, a Hub data set or python-stdlib")
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
    values = settle(merge(values_of(recipe) | {"on_device": {}}, upper), problems)
    applied = _build(values, problems, f"on_device.{kind}: " if section else "")
    if problems or applied is None:
        raise RecipeError(f"recipe {recipe.name}", problems)
    return applied


def _assemble(found: Source, file: Layer, flags: Layer, problems: list[str]) -> Recipe | None:
    """Stacks the layers into a recipe; None if they contradict each other."""
    sizes = file.sizes | flags.sizes
    size = flags.values.get("size") or file.values.get("size")
    if size is not None and size not in sizes:
        problems.append(_no_such_size(size, list(sizes)))
        size = None
    layers = [file, sizes[size] if size is not None else Layer(), flags]
    _check_variants(file, size, problems)
    values = _stack(layers, None, problems)
    values["size"] = size
    devices = sorted({device for layer in layers for device in layer.on_device})
    sections = {device: difference(values, _stack(layers, device, []) | {"size": size}) for device in devices}
    values["on_device"] = {device: plain(section) for device, section in sections.items() if section}
    # What is applied is marked by an empty section, so that a saved recipe does not apply it again over the flags.
    values["sizes"] = {size: {}} if size is not None else {name: plain_layer(layer) for name, layer in sizes.items()}
    if found.default_name is not None:
        values.setdefault("name", found.default_name)
    return _build(values, problems)


def _stack(layers: list[Layer], device: str | None, problems: list[str]) -> dict[str, Any]:
    """Merges layers, each followed by its section for `device`."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values)
        if device is not None:
            values = merge(values, layer.on_device.get(device, {}))
    return settle(values, problems)


def _build(values: Mapping[str, Any], problems: list[str], place: str = "") -> Recipe | None:
    """Makes the recipe, or reports which of its settings contradict one another."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        for entry in error.errors():
            reason = entry.get("ctx", {}).get("error") or f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}"
            problems.extend(place + sentence for sentence in str(reason).splitlines())
        return None


def _check_variants(file: Layer, chosen: str | None, problems: list[str]) -> None:
    """Reports contradictions in sizes and device sections of the file that this run does not choose."""
    known: list[str] = []
    _build(_stack([file], None, known), known)
    for name, device in product([None, *file.sizes], [None, *DEVICES]):
        section = file.sizes[name] if name is not None else Layer()
        if (device is None and name == chosen) or (device and device not in file.on_device | section.on_device):
            continue
        found: list[str] = []
        _build(_stack([file, section], device, found), found)
        place = " ".join([f"sizes.{name}"] * (name is not None) + [f"on_device.{device}"] * (device is not None))
        problems.extend(f"{place}: {problem}" for problem in found if problem not in known)
        known += found


def _lacks_dataset(recipe: Recipe | None, file: Layer, flags: Layer) -> bool:
    if "dataset" in file.refused | flags.refused:
        return False
    if recipe is not None:
        return not recipe.dataset and not any(section.get("dataset") for section in recipe.on_device.values())
    return not (file.values.get("dataset") or flags.values.get("dataset"))


def _no_such_size(size: str, sizes: list[str]) -> str:
    if not sizes:
        return f"size is {size!r}, but this recipe has no sizes: leave it out"
    return f"size is {size!r}, but the sizes of this recipe are {', '.join(sizes)}{did_you_mean(nearest(size, sizes))}"
