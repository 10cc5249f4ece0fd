"""What several decisions refuse, told together."""

from collections.abc import Callable
from typing import Any, TypeVar

from onecard.errors import InputError, RecipeError
from onecard.spec import Recipe

_Decision = TypeVar("_Decision")


class Problems:
    """Collects what decisions refuse, to report it together."""

    def __init__(self) -> None:
        self._found: list[InputError] = []

    def attempt(self, decide: Callable[..., _Decision], *grounds: Any) -> _Decision | None:
        """Makes a decision; None if it is refused."""
        try:
            return decide(*grounds)
        except InputError as error:
            self._found.append(error)
            return None

    def report(self, recipe: Recipe) -> None:
        """Raises what was refused, if anything."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            sentences = [
                sentence
                for error in self._found
                for sentence in (error.problems if isinstance(error, RecipeError) else [str(error)])
            ]
            raise RecipeError(f"recipe {recipe.name}", sentences)
