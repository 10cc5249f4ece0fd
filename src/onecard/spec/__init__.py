"""Nouns: what is wanted, what was decided, what was found, how good it is. No torch."""

from onecard.spec.dump import recipe_to_yaml
from onecard.spec.finding import Finding
from onecard.spec.forecast import Alternative, CardGroup, Forecast, MemoryForecast, TimeForecast
from onecard.spec.load import apply_device, load_recipe
from onecard.spec.mask_audit import MaskAudit
from onecard.spec.plan import (
    AdaptPlan,
    BasePlan,
    CorpusFacts,
    EvalTasksPlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    SchedulePlan,
)
from onecard.spec.recipe import DatasetSource, Recipe
from onecard.spec.score import CheckpointScores, Comparison, Evaluation, Score
from onecard.spec.source import RecipeInfo, describe_recipe, recipe_names
from onecard.spec.spelling import KeyInfo, recipe_keys

__all__ = [
    "AdaptPlan",
    "Alternative",
    "BasePlan",
    "CardGroup",
    "CheckpointScores",
    "Comparison",
    "CorpusFacts",
    "DatasetSource",
    "EvalTasksPlan",
    "Evaluation",
    "Finding",
    "Forecast",
    "KeyInfo",
    "MaskAudit",
    "MemoryForecast",
    "ModelPlan",
    "OptimizerPlan",
    "Plan",
    "Recipe",
    "RecipeInfo",
    "SchedulePlan",
    "Score",
    "TimeForecast",
    "apply_device",
    "describe_recipe",
    "load_recipe",
    "recipe_keys",
    "recipe_names",
    "recipe_to_yaml",
]
