"""Recipe + machine -> Plan: every decision as a number, with its reason."""

from onecard.planner.choose import Measurements, check_recipe, make_plan
from onecard.planner.device import Target, choose_device, find_target, kind_of, target_of_card
from onecard.planner.facts import facts_of, survey_facts
from onecard.planner.fit import FirstAnswer
from onecard.planner.ladder import list_alternatives
from onecard.planner.on_cpu import loaded_bytes

__all__ = [
    "FirstAnswer",
    "Measurements",
    "Target",
    "check_recipe",
    "choose_device",
    "facts_of",
    "find_target",
    "kind_of",
    "list_alternatives",
    "loaded_bytes",
    "make_plan",
    "survey_facts",
    "target_of_card",
]
