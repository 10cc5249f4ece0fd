"""From the words of a command line to a recipe, for the verbs that take one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onecard.cli.flags import FlagKind, parse_flags
from onecard.errors import InputError

if TYPE_CHECKING:
    from onecard.spec import Recipe

RecipeWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE --key VALUE",
        help="A recipe (a shipped name or a YAML file) and values for its keys; `onecard recipes --keys` lists them.",
        show_default=False,
    ),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="The recipe as a YAML file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


def recipe_from_words(words: Sequence[str], config: Path | None, verb: str = "train") -> "Recipe":
    """Loads the recipe that a command line of `verb` names, with its flags as overrides."""
    source, overrides = source_from_words(words, config)
    if source is None and not overrides:
        raise InputError(f"name a recipe, for example: onecard {verb} demo; `onecard recipes` lists them")
    from onecard import api

    return api.load_recipe(source, **overrides)


def source_from_words(words: Sequence[str], config: Path | None) -> tuple[str | None, dict[str, Any]]:
    """The recipe that a command line names, None where it names none, and its flags as overrides."""
    parsed = parse_flags(words, flag_kinds())
    _refuse_resume(parsed.overrides)
    for word in parsed.positionals:
        if word in parsed.after_switch:
            _refuse_switch_value(parsed.after_switch[word], word)
    sources = [*parsed.positionals, *([str(config)] if config else [])]
    if len(sources) > 1:
        raise InputError(
            f"one recipe at a time, but there are {len(sources)}: {', '.join(sources)}; "
            "a value needs its flag before it, as in --dataset FILE"
        )
    return (sources[0] if sources else None), {**parsed.overrides}


def _refuse_resume(overrides: Mapping[str, Any]) -> None:
    """`train` takes `--resume` out of the words itself, so what is left was given to another verb."""
    from onecard.spec.spelling import find_key

    for key in overrides:
        if find_key(key) == "resume_from_checkpoint":
            raise InputError(f"--{key} is for train alone: a run keeps the plan and the text it was started with")


def _refuse_switch_value(flag: str, word: str) -> None:
    """Refuses a word after a switch that is neither a value of it nor a recipe."""
    from onecard.spec.accepts import accepts
    from onecard.spec.paths import locate
    from onecard.spec.source import recipe_names
    from onecard.spec.spelling import find_spelling

    spelling = find_spelling(flag)
    if spelling is None or word in recipe_names() or locate(word) or Path(word).suffix in (".yaml", ".yml"):
        return
    takes = f"takes {accepts(spelling.key).text}"
    try:
        if spelling.translate:
            spelling.translate(word)
    except ValueError as error:
        takes = str(error)
    raise InputError(f"--{flag} {word}: {takes}, and there is no recipe named {word}; `onecard recipes` lists them")


def flag_kinds() -> dict[str, FlagKind]:
    """Says of every key and every other spelling of it what stands after its flag."""
    from onecard.spec.accepts import FIELDS, accepts
    from onecard.spec.spelling import SPELLINGS

    kinds: dict[str, FlagKind] = {}
    for key in FIELDS:
        types = accepts(key).kinds
        kinds[key] = FlagKind.SWITCH if bool in types else FlagKind.LIST if tuple in types else FlagKind.VALUE
    for row in SPELLINGS:
        if row.key in kinds:
            kinds[row.name] = kinds[row.key] if row.translate is None else _kind_of_translated(row.translate)
    return kinds


def _kind_of_translated(translate: Callable[[Any], Any]) -> FlagKind:
    """A spelling such as `fp16` or `no_mixed_precision` is a switch if it has a meaning for true."""
    try:
        translate(True)
    except ValueError:
        return FlagKind.VALUE
    return FlagKind.SWITCH
