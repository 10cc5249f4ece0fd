"""`onecard recipes`."""

from typing import Annotated

import typer

from onecard.cli.rows import print_rows


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this recipe as YAML.")] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="List every key: what it takes, its default, other names it goes by.")
    ] = False,
) -> None:
    """Lists the recipes that come with onecard, or shows one."""
    from onecard.spec.source import describe_recipe, recipe_names

    if keys:
        _print_keys()
    elif name is not None:
        print(describe_recipe(name).text, end="")
    else:
        print_rows([(info.name, info.description) for info in map(describe_recipe, recipe_names())])


def _print_keys() -> None:
    from onecard.spec.accepts import show
    from onecard.spec.spelling import recipe_keys

    for key in recipe_keys():
        print(f"{key.name}: {key.type}; default {show(key.default)}")
        also = f" (also: {', '.join(key.spellings)})" if key.spellings else ""
        print(f"    {key.description}{also}")
