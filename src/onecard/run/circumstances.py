"""For what a checkpoint was written: the card, and the recipe as it is written down."""

from typing import Any

import torch

from onecard.spec import Plan, Recipe, recipe_to_yaml


def circumstances_of(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """The card of this process, and the recipe of the run; with which versions says its versions.jsonl."""
    card, card_bytes = "CPU", None
    if plan.device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.device(plan.device))
        card, card_bytes = properties.name, properties.total_memory
    return {"card": card, "card_bytes": card_bytes, "recipe": recipe_to_yaml(recipe)}
