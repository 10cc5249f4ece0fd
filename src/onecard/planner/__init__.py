"""Recipe + machine -> Plan: every decision as a number, with its reason."""

from onecard.planner.choose import Measurements, check_recipe, make_plan
from onecard.planner.device import Target, choose_device, find_target, kind_of, target_of_card

__all__ = [
    "Measurements",
    "Target",
    "check_recipe",
    "choose_device",
    "find_target",
    "kind_of",
    "make_plan",
    "target_of_card",
]
