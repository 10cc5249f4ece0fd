"""What the ranks of a plan tell one another in a step, and how much of it no computing hides.

ddp    backward of the last micro-batch  ▒▒▒▒▒▒▒▒▒▒▒▒
       sums of its buckets, in fp32         ░░░░░░░░░░░░░░    the end of them is waited for
fsdp   forward ▒▒▒▒▒▒▒▒  backward ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒   of each micro-batch
       layers  ░░░░░░░░  again    ░░░░░░░░, and its gradients, cut while they are summed
"""

from dataclasses import dataclass

from onecard.planner.communication import Fabric
from onecard.planner.parts import ModelParts, find_parts
from onecard.planner.trace import Trace
from onecard.spec import Plan
from onecard.training.spread import BUCKET_BYTES
from onecard.units import MIB

# Of `DistributedDataParallel`.
_FIRST_BUCKET_BYTES = MIB
_SINGLE_BYTES, _HALF_BYTES = 4, 2


@dataclass(frozen=True)
class Passes:
    """Seconds that one micro-batch of a rank computes."""

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class Exchange:
    """Seconds of a step that ranks communicate, and those in which a card waits for it: expected, least and most."""

    all_s: float
    exposed_s: float
    exposed_low_s: float
    exposed_high_s: float


def exchange_of(plan: Plan, share: Plan, trace: Trace, passes: Passes, fabric: Fabric) -> Exchange:
    """Predicts the communication of a step of `plan`, of which each rank computes `share`, whose trace this is."""

    def at(bytes_per_s: float) -> tuple[float, float]:
        if plan.strategy == "fsdp":
            return _gathers(share, find_parts(plan.model), passes, fabric, bytes_per_s)
        return _sums(trace, passes, fabric, bytes_per_s)

    all_s, exposed_s = at(fabric.rate.expected)
    return Exchange(all_s, exposed_s, at(fabric.rate.most)[1], at(fabric.rate.least)[1])


def _sums(trace: Trace, passes: Passes, fabric: Fabric, bytes_per_s: float) -> tuple[float, float]:
    """Sums of whole gradients: all seconds, and those that are waited for."""
    record = trace.record
    sizes = [record.sizes[number] for number, label in record.labels.items() if label == "gradients"]
    if not sizes:
        return 0.0, 0.0
    num_buckets = 1 + -(-max(0, sum(sizes) - _FIRST_BUCKET_BYTES) // BUCKET_BYTES)
    # The embedding's is the last gradient to come, and as a rule the largest.
    last = min(sum(sizes), max(BUCKET_BYTES, *sizes))
    all_s = fabric.sum_s(sum(sizes), num_buckets, bytes_per_s)
    return all_s, max(fabric.sum_s(last, 1, bytes_per_s), all_s - passes.backward_s)


def _gathers(share: Plan, parts: ModelParts, passes: Passes, fabric: Fabric, bytes_per_s: float) -> tuple[float, float]:
    """Gathers of weights and cut sums of gradients: all seconds, and those that are waited for."""
    width = _SINGLE_BYTES if share.precision == "fp32" else _HALF_BYTES
    layers, num_layers = width * sum(parts.layers), len(parts.layers)
    root_s = fabric.gather_s(width * parts.root, 1, bytes_per_s)
    layers_s = fabric.gather_s(layers, num_layers, bytes_per_s)
    # Nothing can be computed before the embedding and the first layer are there; afterwards a layer ahead is gathered.
    first_s = root_s + layers_s / max(1, num_layers)
    cut_s = fabric.gather_s(_SINGLE_BYTES * parts.total, num_layers + 1, bytes_per_s)
    # The embedding's gradient is the last one.
    last_s = fabric.gather_s(_SINGLE_BYTES * parts.root, 1, bytes_per_s)
    forward_s = max(first_s, root_s + layers_s - passes.forward_s)
    backward_s = max(layers_s / max(1, num_layers) + last_s, layers_s + cut_s - passes.backward_s)
    all_s, exposed_s = (
        share.num_micro_batches * (root_s + 2 * layers_s + cut_s),
        share.num_micro_batches * (forward_s + backward_s),
    )
    if share.optimizer.name == "muon":
        # Its matrices are made whole for the update, and nothing is computed meanwhile.
        return all_s + layers_s, exposed_s + layers_s
    return all_s, exposed_s
