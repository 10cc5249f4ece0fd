"""Which settings a bench tries: `key=value,value` once or several times, and their product."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from onecard.errors import InputError, RecipeError
from onecard.spec import load_recipe
from onecard.spec.spelling import find_key

# Half a minute each, and nobody reads more rows.
_MOST_SETTINGS = 64
# Each of these names a whole, whose values are no numbers to sweep over.
_NOT_SWEPT = (
    "name",
    "description",
    "output_dir",
    "run_name",
    "report_to",
    "resume_from_checkpoint",
    "sizes",
    "on_device",
)

Setting = dict[str, str]


def parse_sweeps(texts: Sequence[str]) -> dict[str, list[str]]:
    """Reads `per_device_train_batch_size=16,24,32`: values by key, in the order given.

    Raises:
        InputError: with all that cannot be read together.
    """
    found: dict[str, list[str]] = {}
    problems: list[str] = []
    for text in texts:
        key, equals, rest = text.partition("=")
        name = find_key(key.strip().replace("-", "_")) or key.strip().replace("-", "_")
        values = [value.strip() for value in rest.split(",")]
        if not equals or not key.strip() or not all(values):
            problems.append(f"--sweep {text!r} is no key=value,value: write --sweep per_device_train_batch_size=8,16")
        elif name in found:
            problems.append(f"--sweep {text!r}: {name} is swept already; give all of its values at once")
        elif name in _NOT_SWEPT:
            problems.append(f"--sweep {text!r}: {name} changes nothing that could be timed; sweep over another key")
        elif len(set(values)) < len(values):
            problems.append(f"--sweep {text!r} has a value twice: give each once")
        else:
            found[name] = values
    if problems:
        raise InputError("\n".join(problems))
    return found


def list_settings(sweeps: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """All combinations, the last key changing fastest; a single empty setting where nothing is swept.

    Raises:
        InputError: there are too many.
    """
    settings = [dict(zip(sweeps, map(str, values), strict=True)) for values in itertools.product(*sweeps.values())]
    if len(settings) > _MOST_SETTINGS:
        counts = " x ".join(str(len(values)) for values in sweeps.values())
        raise InputError(f"{counts} = {len(settings)} settings are more than {_MOST_SETTINGS}: sweep over fewer values")
    return settings


def check_settings(source: Any, overrides: Mapping[str, Any], settings: Sequence[Setting]) -> None:
    """Loads the recipe with each setting, before anything is run.

    Raises:
        InputError: a key is given as a flag and swept, too, or settings are refused; all of them together.
    """
    given = {find_key(key) or key for key in overrides}
    if twice := [key for key in settings[0] if key in given]:
        raise InputError(f"{', '.join(twice)}: given as a flag and in a --sweep, too; keep one of them")
    problems: list[str] = []
    origin = ""
    for setting in settings:
        try:
            load_recipe(source, require_dataset=False, **{**overrides, **setting})
        except RecipeError as error:
            origin = error.origin
            problems += error.problems
    if problems:
        raise RecipeError(origin, list(dict.fromkeys(problems)))


def name_of(setting: Mapping[str, str]) -> str:
    """`per_device_train_batch_size=16 torch_compile=true`, or `as it is`."""
    return " ".join(f"{key}={value}" for key, value in setting.items()) or "as it is"
