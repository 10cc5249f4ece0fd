"""Where and with what a checkpoint was written, and how that differs from here."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from onecard.spec import Plan, Recipe, recipe_to_yaml

# Of these another version may compute other digits; the rest of an environment does not touch the numbers of a run.
_PACKAGES = ("onecard", "torch", "transformers", "peft", "bitsandbytes", "tokenizers")


def circumstances_of(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """Versions, platform and card of this process, and the recipe of the run as it is written down."""
    is_cuda = plan.device.startswith("cuda") and torch.cuda.is_available()
    card, card_bytes = "CPU", None
    if is_cuda:
        properties = torch.cuda.get_device_properties(torch.device(plan.device))
        card, card_bytes = properties.name, properties.total_memory
    versions = {name: _version(name) for name in _PACKAGES}
    where = {"platform": sys.platform, "card": card, "card_bytes": card_bytes}
    return {"versions": versions, **where, "recipe": recipe_to_yaml(recipe)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
