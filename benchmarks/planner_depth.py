"""Deep compiled plans as interpolated from shallow models, beside the trace of the whole model; without a GPU.

    python benchmarks/planner_depth.py [part of a row's name ...]      # a minute or two of a core for every row

Traces are cached, so that a broken call goes on. With names given, nothing is written.
"""

import argparse
import time
from typing import Any

from plans import Setting
from record import write_result

from onecard.hardware import find_card, workspace_bytes
from onecard.planner.depth import TracedPlan, interpolate
from onecard.planner.efficiency import default_efficiencies
from onecard.planner.roofline import predict_time
from onecard.planner.trace_cache import trace_cached
from onecard.spec import Plan
from onecard.units import GIB

_CARD = "rtx-3060-12gb"
_UNLIMITED = 10**15
MIB = 2**20


def list_rows() -> list[tuple[str, Plan]]:
    """Deep models as people train them on small cards: all weights and adapters, kept and recomputed."""
    smol = Setting("SmolLM2-135M", 4, 1024, num_micro_batches=16, is_compiled=True)
    dialogue = Setting("DialoGPT-medium", 4, 512, num_micro_batches=2, is_compiled=True)
    tiny = Setting("TinyLlama-1.1B", 2, 256, "qlora", num_micro_batches=2, is_compiled=True, recomputes=True)
    deep = Setting("qwen3-75M", 8, 1024, is_compiled=True, settings=(("num_hidden_layers", 24),))
    settings = [
        *(smol, smol.but(recomputes=True), smol.but(method="lora", recomputes=True)),
        *(dialogue, dialogue.but(recomputes=True), tiny, deep, deep.but(recomputes=True)),
        *(smol.but(recomputes=0.5), dialogue.but(recomputes=0.25)),
    ]
    rows = [(setting.name, setting.plan("cuda:0", _UNLIMITED)) for setting in settings]
    plan = deep.but(recomputes=True).plan("cuda:0", _UNLIMITED)
    muon = plan.model_copy(update={"optimizer": plan.optimizer.model_copy(update={"name": "muon"})})
    return [*rows, (f"{deep.name} muon recomputed", muon)]


def compare(plan: Plan) -> dict[str, Any] | None:
    """Both peaks, phases and step times; None for a plan that is not interpolated."""
    card = find_card(_CARD)
    row: dict[str, Any] = {}
    peaks, steps, phases = [], [], []
    for name in ("predicted", "whole"):
        started = time.process_time()
        capability = card.compute_capability
        found = interpolate(plan, capability) if name == "predicted" else TracedPlan(trace_cached(plan, capability))
        if found is None:
            return None
        row[f"{name}_s"] = time.process_time() - started
        peak = found.replay(workspace_bytes(card))
        peaks.append((peak.reserved_bytes, peak.allocated_bytes))
        phases.append(peak.phase_bytes)
        steps.append(predict_time(found.trace, plan, card, default_efficiencies(card)).step_s)
        row[name] = {
            "reserved_bytes": peak.reserved_bytes,
            "allocated_bytes": peak.allocated_bytes,
            "phase": peak.phase,
            "step_s": steps[-1],
        }
    errors = [mine / whole - 1 for mine, whole in zip(*peaks, strict=True)]
    worst = max(abs(phases[0].get(name, 0) / size - 1) for name, size in phases[1].items())
    return row | {
        "reserved_error": errors[0],
        "allocated_error": errors[1],
        "worst_phase_error": worst,
        "step_error": steps[0] / steps[1] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="parts of the names of the rows to look at")
    only = parser.parse_args().only
    rows: dict[str, Any] = {}
    for name, plan in list_rows():
        if only and not any(part in name for part in only):
            continue
        if (row := compare(plan)) is None:
            print(f"{name:70} not interpolated", flush=True)
            continue
        rows[name] = row
        predicted, whole = (row[key]["reserved_bytes"] / GIB for key in ("predicted", "whole"))
        slack = [(row[key]["reserved_bytes"] - row[key]["allocated_bytes"]) / MIB for key in ("predicted", "whole")]
        print(
            f"{name:70} {predicted:6.3f} {whole:6.3f} GiB {row['reserved_error']:+.2%}, slack {slack[0]:.0f} and "
            f"{slack[1]:.0f} MiB, allocated {row['allocated_error']:+.2%}, worst phase {row['worst_phase_error']:.2%}, "
            f"step {row['step_error']:+.2%}; {row['predicted_s']:.0f} and {row['whole_s']:.0f} s",
            flush=True,
        )
    if not only:
        write_result("planner_depth", {"card": _CARD, "rows": rows})


if __name__ == "__main__":
    main()
