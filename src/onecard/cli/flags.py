"""Command line words to recipe overrides: every recipe key is a flag."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from onecard.errors import InputError

FlagValue = str | bool | list[str]

_TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
_FALSE_WORDS = frozenset({"false", "no", "off", "0"})
# What may follow a switch: `--torch_compile auto`, `--mixed_precision bf16`, `--tie_word_embeddings null`.
_SWITCH_WORDS = _TRUE_WORDS | _FALSE_WORDS | {"auto", "null", "none", "bf16", "fp16", "fp32"}


class FlagKind(Enum):
    """What stands after a flag: one value, a value or nothing, or one of several values."""

    VALUE = "value"
    SWITCH = "switch"
    LIST = "list"


@dataclass
class Words:
    """What a command line says: the words that belong to no flag, and the value of each flag by its key.

    `after_switch` tells the switch before a word: `--fp16 demo` names a recipe, but `--fp16 maybe` is a slip.
    """

    positionals: list[str] = field(default_factory=list)
    overrides: dict[str, FlagValue] = field(default_factory=dict)
    after_switch: dict[str, str] = field(default_factory=dict)


def parse_flags(args: Sequence[str], kinds: Mapping[str, FlagKind]) -> Words:
    """Sorts `--key value`, `--key=value`, `--switch` and `--no-switch` from other words.

    `kinds` knows the keys, with underscores. Values stay text; the recipe loader turns them into numbers. A flag that
    `kinds` does not know is passed on, so that the loader reports it with the nearest name and all other problems.
    Raises `InputError` for a flag without its value and for a second value of a key that holds one.
    """
    words = Words()
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            words.positionals.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        key = name.replace("-", "_")
        kind = kinds.get(key.lower())
        is_negated = kind is None and _negates_switch(key.lower(), kinds)
        if is_negated:
            key, kind = key[len("no_") :], FlagKind.SWITCH
        if kind is FlagKind.SWITCH and not equals and rest:
            words.after_switch[rest[0]] = name
        value = text if equals else rest.pop(0) if rest and _can_be_value(rest[0], kind) else None
        _add(words.overrides, key, _meaning(f"--{name}", value, kind, is_negated), kind)
    return words


def _is_flag(word: str) -> bool:
    """A key starts with a letter: `--` alone, `--- a title` and `-1e-3` are values."""
    return word.startswith("--") and word[2:3].isalpha()


def _negates_switch(key: str, kinds: Mapping[str, FlagKind]) -> bool:
    return key.startswith("no_") and kinds.get(key[len("no_") :]) is FlagKind.SWITCH


def _can_be_value(word: str, kind: FlagKind | None) -> bool:
    # `--fp16 demo`: the word after a switch is its value only if it can be one, otherwise it is the recipe.
    return word.lower() in _SWITCH_WORDS if kind is FlagKind.SWITCH else not _is_flag(word)


def _meaning(flag: str, value: str | None, kind: FlagKind | None, is_negated: bool) -> str | bool:
    if value is None:
        if kind in (FlagKind.VALUE, FlagKind.LIST):
            raise InputError(f"{flag} needs a value: {flag} VALUE, or {flag}=VALUE")
        return not is_negated
    if kind is FlagKind.SWITCH and value.lower() in _TRUE_WORDS:
        return not is_negated
    if kind is FlagKind.SWITCH and value.lower() in _FALSE_WORDS:
        return is_negated
    if is_negated:
        raise InputError(f"{flag} {value}: takes true or false, or no value")
    return value


def _add(overrides: dict[str, FlagValue], key: str, value: str | bool, kind: FlagKind | None) -> None:
    if kind is FlagKind.LIST:
        earlier = overrides.get(key, [])
        overrides[key] = [*earlier, str(value)] if isinstance(earlier, list) else [str(value)]
    elif overrides.setdefault(key, value) != value:
        raise InputError(f"--{key} is given twice, as {overrides[key]} and as {value}: keep one of them")
