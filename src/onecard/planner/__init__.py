"""Recipe + machine -> Plan: every decision as a number, with its reason."""

from onecard.planner.choose import Measurements, make_plan
from onecard.planner.decisions import check_recipe
from onecard.planner.device import Target, choose_device, find_target, kind_of, target_of_card
from onecard.planner.eval_tasks import plan_tasks
from onecard.planner.facts import facts_of, survey_facts
from onecard.planner.fit import FirstAnswer
from onecard.planner.ladder import OnWait, list_alternatives
from onecard.planner.on_cpu import loaded_bytes

__all__ = [
    "FirstAnswer",
    "Measurements",
    "OnWait",
    "Target",
    "check_recipe",
    "choose_device",
    "facts_of",
    "find_target",
    "kind_of",
    "list_alternatives",
    "loaded_bytes",
    "make_plan",
    "plan_tasks",
    "survey_facts",
    "target_of_card",
]
