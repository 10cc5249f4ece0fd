"""Which optimizers a run may take, and which others a plan compares it with."""

from importlib.util import find_spec

from onecard.errors import InputError
from onecard.model.nf4 import load_operators
from onecard.planner.device import Target
from onecard.spec import Plan, Recipe


def check_optimizer(recipe: Recipe, target: Target) -> None:
    """Refuses an optimizer that cannot run there.

    Raises:
        InputError: state in 8 bits without bitsandbytes, or paged where nothing can be paged.
    """
    unpaged = recipe.optim.removeprefix("paged_")
    if recipe.optim != unpaged and target.kind == "cpu":
        raise InputError(
            f"optim {recipe.optim} needs a GPU: on a CPU the state is in the host's memory anyway. Use optim {unpaged}"
        )
    if recipe.optim != unpaged and target.host in ("windows", "wsl"):
        # Without concurrentManagedAccess (CUDA C++ Programming Guide, unified memory) all of it must fit the card.
        raise InputError(
            f"optim {recipe.optim} needs Linux: CUDA on Windows, WSL included, cannot move single pages to the card. "
            "Use optim adamw_8bit"
        )
    if recipe.optim not in ("adamw", "muon"):
        load_operators(f"optim {recipe.optim}", "optim adamw")


def other_optimizers(plan: Plan) -> list[str]:
    """Optimizers to compare a plan's with: the unpaged ones that can run here."""
    names = ["adamw", "adamw_8bit", "muon"] if find_spec("bitsandbytes") else ["adamw", "muon"]
    return [name for name in names if name != plan.optimizer.name]
