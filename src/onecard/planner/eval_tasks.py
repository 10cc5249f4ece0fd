"""What scoring checkpoints while training takes."""

from onecard.evaluation.responses import BATCH_SIZES
from onecard.spec import EvalTasksPlan, Recipe


def plan_tasks(recipe: Recipe, kind: str, reasons: dict[str, str]) -> EvalTasksPlan | None:
    """Settles by what checkpoints are scored; None where nothing but their loss counts."""
    if not recipe.eval_tasks:
        return None
    metric = recipe.metric_for_best_model
    if metric == "auto":
        metric = recipe.eval_tasks[0]
        reasons["eval_tasks.metric"] = "the first of eval_tasks says which checkpoint is best"
    return EvalTasksPlan(
        names=tuple(dict.fromkeys(recipe.eval_tasks)),
        metric="loss" if metric == "eval_loss" else metric,
        limit=recipe.eval_limit,
        max_new_tokens=recipe.eval_max_new_tokens,
        batch_size=BATCH_SIZES[kind],
    )
