"""What a plan keeps on the card whatever its step does, by arithmetic: known before anything is traced."""

from onecard.planner.shape import count_adapters
from onecard.spec import Plan

_SINGLE_BYTES, _HALF_BYTES = 4, 2
# Frozen matrices in 4 bits; what is not quantized takes more.
_NF4_BYTES = 0.5
# Optimizer state per parameter at the least: one moment in fp32, two in 8 bits, two in fp32. Paged state is elsewhere.
_MOMENT_BYTES = {"muon": 4, "adamw_8bit": 2, "adamw": 8}


def least_state(plan: Plan, num_ranks: int = 1) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state during an update, by kind, on a GPU; of several, on each.

    Never more than a trace finds: rounding, quantization constants and vectors kept in fp32 come on top.
    """
    model, is_mixed = plan.model, plan.precision != "fp32"
    num_trained = model.num_parameters if plan.adapt is None else count_adapters(model, plan.adapt)
    weights = num_trained * (_SINGLE_BYTES + (_HALF_BYTES if is_mixed else 0))
    if plan.adapt is not None:
        of_frozen = _NF4_BYTES if plan.adapt.method == "qlora" else _HALF_BYTES if is_mixed else _SINGLE_BYTES
        weights += int(model.num_parameters * of_frozen)
    found = {
        "weights": weights,
        "optimizer": num_trained * _MOMENT_BYTES.get(plan.optimizer.name, 0),
        "gradients": num_trained * _SINGLE_BYTES,
    }
    if plan.strategy == "ddp":
        return found
    # Of weights that are in parts there are none in 16 bits.
    found["weights"] = num_trained * _SINGLE_BYTES
    return {name: num_bytes // num_ranks for name, num_bytes in found.items()}
