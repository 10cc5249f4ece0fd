"""Recipe + machine -> Plan: every decision as a number, with its reason."""

from onecard.planner.choose import Measurements, check_recipe, make_plan
from onecard.planner.device import choose_device, kind_of

__all__ = ["Measurements", "check_recipe", "choose_device", "kind_of", "make_plan"]
