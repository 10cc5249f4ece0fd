"""What scoring checkpoints while training takes."""

from typing import Any

from onecard.evaluation.responses import BATCH_SIZES
from onecard.spec import EvalTasksPlan, Recipe

_BYTES = {"fp32": 4}
_HALF_BYTES = 2


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


def with_cache(tasks: EvalTasksPlan | None, settings: dict[str, Any], precision: str) -> EvalTasksPlan | None:
    """Adds the bytes of keys and values of a batch of responses of full length, where the model's shape tells them."""
    if tasks is None:
        return None
    layers, heads, width = (
        next((settings[name] for name in names if settings.get(name)), None)
        for names in (("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"), ("hidden_size", "n_embd"))
    )
    if not (layers and heads and width):
        return tasks
    head_width = settings.get("head_dim") or width // heads
    of_token = 2 * layers * (settings.get("num_key_value_heads") or heads) * head_width
    rows = min(tasks.batch_size, tasks.limit)
    num_bytes = rows * tasks.max_new_tokens * of_token * _BYTES.get(precision, _HALF_BYTES)
    return tasks.model_copy(update={"cache_bytes": num_bytes})
