"""The machine that a call runs on. Like all of the package it imports torch only when called."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from onecard.spec import Recipe
from onecard.spec.load import apply_device

if TYPE_CHECKING:
    from onecard.hardware import Machine

OnProgress = Callable[[str, int, int | None], None]

# oneDNN would keep the kernels of 1,024 shapes of 16-bit products, a gigabyte where rows are of any length; 64 are as
# fast (LOG.md). Read once, at the first product of the process.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def probe_here() -> "Machine":
    """Returns what this machine has."""
    from onecard.hardware import probe_machine

    return probe_machine()


def apply_its_device(recipe: Recipe, machine: "Machine") -> Recipe:
    """Applies the recipe's section for the device it will run on."""
    if recipe.deterministic:
        make_cublas_deterministic()
    from onecard.planner import choose_device, kind_of

    device, _ = choose_device(recipe.device, machine)
    if kind_of(device) != "cpu":
        return apply_device(recipe, "cuda")
    keep_memory_for_steps()
    return apply_device(recipe, "cpu")


def keep_memory_for_steps() -> None:
    """Lets steps on a CPU take the memory of those before; on a GPU it would only keep the host's from others."""
    from onecard.hardware import keep_freed_memory

    keep_freed_memory()


def make_cublas_deterministic() -> None:
    """Lets matrix products on a GPU give the same bits each time."""
    # Read once, at the first matrix product of the process, which is the planner's.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
