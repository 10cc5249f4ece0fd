"""What a setting takes, in words, and text turned into it: `4e-5`, `1_000`, `yes` and `none` as people write them."""

import json
import re
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from onecard.spec.recipe import DatasetSource, Recipe

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NULL = ("none", "null", "~", "")

MODEL_CONFIG = "model_config"
# A recipe's keys as people write them. `model_config` is reserved in pydantic, so its field has another name.
FIELDS: dict[str, FieldInfo] = {field.alias or name: field for name, field in Recipe.model_fields.items()}


@dataclass(frozen=True)
class Accepts:
    """What a setting takes: the Python types, the words among them, and both as a phrase."""

    kinds: frozenset[type]
    words: tuple[str, ...]
    text: str


@cache
def accepts(key: str) -> Accepts:
    """Says what the recipe key takes."""
    field = FIELDS[key]
    kinds: list[type] = []
    words: list[str] = []
    phrases = _describe(field.annotation, field.metadata, kinds, words)
    return Accepts(frozenset(kinds), tuple(words), _PHRASE_OF_KEY.get(key) or join_or(phrases))


@cache
def adapter(key: str) -> TypeAdapter[Any]:
    """Makes the validator of one key, so that each layer of settings can be checked before they are put together."""
    field = FIELDS[key]
    annotation: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def default_of(key: str) -> Any:
    """Gives the value a key has when nobody sets it."""
    return FIELDS[key].get_default(call_default_factory=True, validated_data={})


def join_or(phrases: list[str]) -> str:
    """Joins phrases as a list of alternatives: 'a, b or c'."""
    unique = list(dict.fromkeys(phrases))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def show(value: Any) -> str:
    """Writes a value as it would stand in a YAML file, shortened to fit a sentence."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or too many digits
        return "too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def coerce(key: str, value: Any) -> Any:
    """Turns text into the number, word, list or mapping that the key takes; the validator itself reads truth values.

    What cannot be turned is returned as it is, for the validator to refuse. Raises ValueError for what the validator
    would misread: a truth value as 0 or 1, half a mapping as a path.
    """
    accepted = accepts(key)
    if isinstance(value, bool) and bool not in accepted.kinds and {int, float} & accepted.kinds:
        raise ValueError(f"takes {accepted.text}")
    if isinstance(value, int | float) and not isinstance(value, bool) and accepted.kinds <= {str, NoneType}:
        return str(value)
    if key == MODEL_CONFIG and isinstance(value, dict):
        return _read_exponents(value)
    if isinstance(value, list) and key in _COLLECTED:
        # Flags given several times arrive as a list of texts.
        found = [_coerce_collection(key, item) if isinstance(item, str) else item for item in value]
        return [part for item in found for part in (item if isinstance(item, list) else [item])]
    if not isinstance(value, str):
        return value
    text = value.strip()
    if key == "model_name_or_path" and not text:  # a variable of the shell that is not set
        raise ValueError("takes a folder, a run, a Hub name or modelscope:NAME; null starts from scratch")
    if NoneType in accepted.kinds and text.lower() in _NULL:
        return None
    if tuple in accepted.kinds or dict in accepted.kinds:
        return _coerce_collection(key, value)
    if text.lower() in accepted.words:
        return text.lower()
    if not {int, float} & accepted.kinds:
        return value
    number = _coerce_number(text, value)
    return int(number) if int in accepted.kinds and isinstance(number, float) and number.is_integer() else number


def parse_bool(value: Any) -> bool:
    """Reads true, yes, on, 1 and their opposites. Raises ValueError with what is accepted."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError("takes true or false")


def parse_number(value: Any) -> float:
    """Reads a number, also from text such as 4e-5 or 1_000. Raises ValueError with what is accepted."""
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError("takes a number")


def _coerce_number(text: str, value: str) -> int | float | str:
    """Tries int first: it keeps every digit of a long number."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return value


def find_undecodable(value: Any) -> str | None:
    """Finds text inside a value that is no Unicode, such as bytes of another encoding on a command line."""
    if isinstance(value, dict):
        return find_undecodable([*value, *value.values()])
    if isinstance(value, list | tuple):
        return next((found for item in value if (found := find_undecodable(item))), None)
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        return value
    return None


def _coerce_collection(key: str, value: str) -> Any:
    text = value.strip()
    if key == "sample_prompts":
        # A prompt may well start with a bracket: only an unmistakable list of quoted texts is one.
        return _list_of_texts(text) or value
    if text[:1] in ("[", "{"):
        try:
            return _read_exponents(yaml.safe_load(text))
        except yaml.YAMLError:
            if text[0] == "{":
                raise ValueError(f"takes {accepts(key).text}, and this is no complete mapping") from None
            return value  # a glob such as [ab]*.txt
    if key == "report_to":
        return [item.strip().lower() for item in text.split(",") if item.strip()]
    return value


def coerce_mapping(value: Any) -> Any:
    """Turns the text of a mapping into one; anything else stays as it is. Raises ValueError for half a mapping."""
    if not isinstance(value, str) or not value.strip().startswith("{"):
        return value
    try:
        return _read_exponents(yaml.safe_load(value))
    except yaml.YAMLError:
        raise ValueError("this is no complete mapping") from None


def _read_exponents(value: Any) -> Any:
    """Turns `1e6` inside a mapping into a number: YAML 1.1 wants 1.0e+6, and PyYAML follows it."""
    if isinstance(value, dict):
        return {key: _read_exponents(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_exponents(item) for item in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _list_of_texts(text: str) -> list[str] | None:
    try:
        items = json.loads(text)
    except ValueError:
        return None
    return items if isinstance(items, list) and all(isinstance(item, str) for item in items) else None


def _describe(annotation: Any, metadata: list[Any], kinds: list[type], words: list[str]) -> list[str]:
    """Collects the types and words of an annotation and returns a phrase per alternative."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item for mark in args[1:] for item in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
        return _describe(args[0], inner, kinds, words)
    if origin in (Union, UnionType):
        return [phrase for arg in args for phrase in _describe(arg, [], kinds, words)]
    if origin is Literal:
        words.extend(args)
        return [str(arg) for arg in args]
    kinds.append(origin or annotation)
    if origin is tuple:
        return [*_describe(args[0], [], [], words), "a list"]
    if annotation is bool:
        return ["true", "false"]
    return [_PHRASES[origin or annotation] + _bounds(metadata)]


_PHRASES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
    dict: "a mapping",
    DatasetSource: "a source",
}
_COLLECTED = ("dataset", "eval_dataset", "report_to", "eval_tasks")
_SOURCES = "a path, a name, a mapping with path, or a list of these"
_PHRASE_OF_KEY = {
    "dataset": _SOURCES,
    "eval_dataset": _SOURCES,
    MODEL_CONFIG: "a path or a mapping with model_type",
    "report_to": "tensorboard, wandb, none or a list",
    "eval_tasks": "ifeval, none or a list",
    "device": "auto, cpu, cuda or cuda:N",
    "memory_limit_gb": "a number of GiB above 0, a number with its unit such as 3.2GB or 3GiB, or null",
    "reserve_gb": "a number of GiB of 0 or more, a number with its unit such as 1.5GB or 2GiB, or null",
}


# Larger upper bounds only refuse nonsense; they are told when they are passed.
TOLD_BOUND = 100


def _bounds(metadata: list[Any]) -> str:
    parts = []
    for mark in metadata:
        if isinstance(mark, annotated_types.Gt):
            parts.append(f"above {mark.gt}")
        elif isinstance(mark, annotated_types.Ge):
            parts.append(f"of {mark.ge} or more")
        elif isinstance(mark, annotated_types.Lt):
            parts.append(f"below {mark.lt}")
        elif isinstance(mark, annotated_types.Le) and float(mark.le) <= TOLD_BOUND:  # type: ignore[arg-type]
            parts.append(f"up to {mark.le}")
    return f" {' and '.join(parts)}" if parts else ""
