"""Nouns: what is wanted, what was decided, what was found, how good it is. No torch."""

from onecard.spec.finding import Finding
from onecard.spec.plan import CorpusFacts, ModelPlan, OptimizerPlan, Plan, SchedulePlan
from onecard.spec.recipe import DatasetSource, Recipe
from onecard.spec.score import Score

__all__ = [
    "CorpusFacts",
    "DatasetSource",
    "Finding",
    "ModelPlan",
    "OptimizerPlan",
    "Plan",
    "Recipe",
    "SchedulePlan",
    "Score",
]
