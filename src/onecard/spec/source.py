"""Where a recipe comes from: a shipped name, a YAML file, a mapping, or nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from onecard.errors import RecipeError
from onecard.spec.paths import locate
from onecard.spec.spelling import did_you_mean, nearest

_SHIPPED = Path(__file__).parent / "recipes"
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Source:
    """Settings as written, what to call them in messages, and the folder their paths may be relative to."""

    origin: str
    settings: Mapping[Any, Any]
    folder: Path | None = None
    default_name: str | None = None


@dataclass(frozen=True)
class RecipeInfo:
    """A shipped recipe for people: its name, one sentence, and its file as written."""

    name: str
    description: str
    text: str


@cache
def recipe_names() -> tuple[str, ...]:
    """Names the shipped recipes."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.yaml")))


def describe_recipe(name: str) -> RecipeInfo:
    """Describes a shipped recipe. Raises RecipeError for an unknown name."""
    if name not in recipe_names():
        raise RecipeError(name, [_no_such_recipe(name)])
    text = (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    return RecipeInfo(name, str(parse_yaml(text, name).get("description", "")), text)


def read_source(source: str | Path | Mapping[str, Any] | None) -> Source:
    """Finds and parses a recipe. Raises RecipeError if there is none or it is not YAML."""
    if source is None:
        return Source("settings", {})
    if isinstance(source, Mapping):
        return Source("recipe", source)
    if isinstance(source, str) and source in recipe_names():
        return Source(f"recipe {source}", parse_yaml(describe_recipe(source).text, source))
    path = locate(source)
    if path is not None and path.is_file():
        return Source(str(path), parse_yaml(_read_text(path), str(path)), path.parent, path.stem)
    raise RecipeError(str(source), [_no_such_recipe(str(source))])


def parse_yaml(text: str, origin: str) -> Mapping[Any, Any]:
    """Parses a mapping. Raises RecipeError with line and column for broken YAML and for a key given twice."""
    try:
        settings = yaml.load(text, _UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = str(error.problem or error.context)
        raise RecipeError(origin, [f"{place}{problem}; this is not valid YAML: {_mend(problem, origin)}"]) from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise RecipeError(origin, [f"not valid YAML: {problem}: {_mend(problem, origin)}"]) from error
    except RecursionError as error:
        raise RecipeError(origin, ["lists or mappings are nested too deeply: write them out flat"]) from error
    except ValueError as error:  # what looks like a number or a date and is none
        problem = str(error).partition(";")[0]
        raise RecipeError(origin, [f"holds a value that cannot be read: {problem}. Put text in quotes"]) from error
    if settings is None:
        raise RecipeError(origin, ["the file is empty: write settings as `key: value` lines"])
    if not isinstance(settings, dict):
        what = "a list" if isinstance(settings, list) else "one value"
        raise RecipeError(origin, [f"the file holds {what}: write settings as `key: value` lines"])
    if _count_values(settings, {}) > _MOST_VALUES:
        raise RecipeError(origin, [f"its aliases stand for more than {_MOST_VALUES:,} values: write out what is meant"])
    return settings


def _mend(problem: str, origin: str) -> str:
    """Says what to change where YAML has the given problem."""
    if Path(origin).suffix.lower() not in ("", ".json", *_SUFFIXES):
        return "a recipe is a YAML file; give text or chats with --dataset and a model with --model_name_or_path"
    return next((remedy for sign, remedy in _REMEDIES.items() if sign in problem), _REMEDIES[""])


# By words of PyYAML's problems; the last one fits all others.
_REMEDIES = {
    "'\\t'": "indent with spaces, not with tabs",
    "is given twice": "keep one of them",
    "another document": "keep one recipe in a file, without a line ---",
    "end of stream": "close the quote or bracket that was opened above",
    "alphabetic or numeric": "put text that begins with * in quotes",
    "alias": "put text that begins with * in quotes",
    "tag": "put text that begins with ! in quotes; objects of programs are never read",
    "unacceptable character": "save the file as plain text in UTF-8",
    "unhashable": "a key is one word",
    "": "write one `key: value` a line, lists as [a, b], and text with : # [ { in quotes",
}
# A recipe has some hundreds; aliases of aliases make billions of a few lines.
_MOST_VALUES = 100_000


def _count_values(value: Any, known: dict[int, int]) -> int:
    """Counts values with each alias written out; what refers to itself is told by those who read it."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 1  # while its parts are counted
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(value)]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML forbids a key given twice; PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key = key_node.value
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")  # PyYAML skips the byte order mark of Windows editors
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [f"byte {error.start} is not UTF-8 text: save the file as UTF-8"]) from error
    except OSError as error:
        raise RecipeError(str(path), [f"cannot be read: {error.strerror or error}"]) from error


def _no_such_recipe(name: str) -> str:
    path, names = Path(name), ", ".join(recipe_names())
    if not name.strip():
        return f"the name of the recipe is empty: name a file, or a shipped recipe ({names})"
    if (found := locate(path)) and found.is_dir():
        inner = path / "recipe.yaml"
        hint = f": name {inner}" if inner.is_file() else " without recipe.yaml: name a file, or a shipped recipe"
        return f"this is a folder{hint}"
    if path.suffix.lower() in _SUFFIXES or len(path.parts) > 1:
        similar = did_you_mean(_nearest_recipes(path.stem))
        return f"there is no such file{similar} (shipped recipes: {names})"
    return f"no shipped recipe and no file has this name{did_you_mean(_nearest_recipes(name))} (shipped: {names})"


def _nearest_recipes(name: str) -> list[str]:
    """Names shipped recipes that look like `name`."""
    by_key = {known.replace("-", "_"): known for known in recipe_names()}
    return [by_key[key] for key in nearest(name, list(by_key))]
