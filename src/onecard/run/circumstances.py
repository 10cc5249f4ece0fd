"""Where and with what a checkpoint was written, and how that differs from here."""

import sys
from typing import Any

import torch

from onecard.run.versions import find_software
from onecard.spec import Plan, Recipe, recipe_to_yaml


def circumstances_of(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """Versions, platform and card of this process, and the recipe of the run as it is written down."""
    is_cuda = plan.device.startswith("cuda") and torch.cuda.is_available()
    card, card_bytes = "CPU", None
    if is_cuda:
        properties = torch.cuda.get_device_properties(torch.device(plan.device))
        card, card_bytes = properties.name, properties.total_memory
    where = {"platform": sys.platform, "card": card, "card_bytes": card_bytes}
    return {"versions": find_software(), **where, "recipe": recipe_to_yaml(recipe)}
