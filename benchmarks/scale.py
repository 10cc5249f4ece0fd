"""Shipped recipes on 1 to 64 cards of three kinds, on paper: the tables of docs/scale.md, made by the planner.

    python benchmarks/scale.py                       every recipe; some minutes, less when traces are remembered
    python benchmarks/scale.py --only tinyllama
    python benchmarks/scale.py --published measured_points.csv

Each plan is `onecard plan RECIPE --card X --num_processes N` with eager steps and the micro-batch named, less where a
rank's share is less. Nothing here was measured. `--published` sets the predicted speed of llm-foundry's runs on eight
cards (FSDP) beside what was published; its models are rebuilt as in planner_time.py.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from planner_time import Row, find, plan_of, read_rows
from record import write_result

from onecard import api
from onecard.errors import DoesNotFitError
from onecard.planner import Target, fit, strategy
from onecard.planner.candidate import Candidate
from onecard.planner.communication import find_fabric
from onecard.planner.efficiency import default_efficiencies
from onecard.planner.group_time import predict_group_time
from onecard.planner.trace import trace_plan
from onecard.spec import CardGroup, Plan, load_recipe
from onecard.units import format_bytes

NUMBERS = (1, 2, 4, 8, 16, 32, 64)
_GB = 1e9


@dataclass(frozen=True)
class Kind:
    """A kind of card, and what joins machines of eight of them."""

    card: str
    network_bytes_per_s: float
    network: str


# The networks are those of NVIDIA's own machines (eight adapters of 200 and 400 Gb/s), and one of 100 Gb/s.
KINDS = (
    Kind("rtx-4090", 12.5 * _GB, "one adapter of 100 Gb/s a machine"),
    Kind("a100-80gb-sxm", 200 * _GB, "eight adapters of 200 Gb/s a machine"),
    Kind("h100-sxm", 400 * _GB, "eight adapters of 400 Gb/s a machine"),
)


@dataclass(frozen=True)
class Case:
    """A recipe with what is asked for besides; `rows` of a step, of which `micro_batch` are computed at a time."""

    name: str
    recipe: str | dict[str, Any]
    rows: int
    micro_batch: int
    flags: dict[str, Any] = field(default_factory=dict)


_SEVEN_B = {
    "dataset": "python-stdlib",
    "tokenizer": "bpe",
    "vocab_size": 32000,
    "model_config": {"model_type": "llama", "intermediate_size": 11008},
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_seq_length": 2048,
    "max_steps": 1000,
    "optim": "adamw",
}
_RECOMPUTE = {"gradient_checkpointing": True}
_KEEP = {"gradient_checkpointing": False}
_APART = {"packing": False}
CASES = (
    Case("a6000-pretrain, medium: 124M, 128 x 1024", "a6000-pretrain", 128, 8, {"size": "medium"} | _KEEP),
    Case(
        "rtx-3060-tinyllama, full: 1.1B, 32 x 512",
        "rtx-3060-tinyllama",
        32,
        4,
        {"method": "full"} | _RECOMPUTE | _APART,
    ),
    Case("rtx-3060-tinyllama, QLoRA: 1.1B, 32 x 512", "rtx-3060-tinyllama", 32, 4, _RECOMPUTE | _APART),
    Case("rtx-4060-laptop-sft: 135M, 64 x 1024", "rtx-4060-laptop-sft", 64, 4, _KEEP | _APART),
    Case("rtx-5060-pretrain: 75M, 24 x 1024", "rtx-5060-pretrain", 24, 8, _KEEP),
    Case("no recipe: 6.7B from scratch, 128 x 2048", _SEVEN_B, 128, 2, _RECOMPUTE),
)


def plan_for(case: Case, kind: Kind, num: int) -> dict[str, Any]:
    """What the planner says of a case on so many cards, or why it says nothing."""
    group = CardGroup(num=num, card=kind.card, per_machine=8, network_bytes_per_s=kind.network_bytes_per_s)
    if num > case.rows:
        return {"problem": "more cards than samples"}
    size = min(case.micro_batch, case.rows // num)
    batch = {"per_device_train_batch_size": size, "total_batch_size": case.rows, "gradient_accumulation_steps": "auto"}
    recipe = load_recipe(case.recipe, **batch, **case.flags, torch_compile=False, sample_prompts=())
    # What would fit instead is not asked for: it takes many traces.
    with patch.object(fit, "does_not_fit", _refuse), patch.object(strategy, "does_not_fit", _refuse):
        try:
            made = api.plan(recipe, card=kind.card if num == 1 else group, platform="linux-headless", refine=False)
        except DoesNotFitError:
            return {"problem": "does not fit"}
    return _figures(made)


def _refuse(nearest: Candidate, _: Target) -> DoesNotFitError:
    return DoesNotFitError("does not fit", nearest.plan)


def _figures(made: Plan) -> dict[str, Any]:
    assert made.forecast is not None
    memory, time = made.forecast.memory, made.forecast.time
    assert time is not None
    return {
        "strategy": made.strategy if made.forecast.num_ranks > 1 else None,
        "micro_batch": made.micro_batch_size,
        "num_micro_batches": made.num_micro_batches,
        "gradient_checkpointing": made.gradient_checkpointing,
        "peak_bytes": memory.peak_bytes,
        "gathered_bytes": memory.breakdown.get("gathered", 0),
        "step_s": time.step_s,
        "step_low_s": time.step_low_s,
        "step_high_s": time.step_high_s,
        "communication_s": time.communication_s,
        "exposed_communication_s": time.exposed_communication_s,
        "efficiency": time.efficiency,
        "tokens_per_s": time.tokens_per_s,
        "limited_by": time.limited_by,
    }


def add_speedups(row: dict[int, dict[str, Any]]) -> None:
    """Sets each number of cards beside one card with its own, larger micro-batch, where the run fits there."""
    alone = row[1]
    for num, found in row.items():
        if "problem" not in alone and "problem" not in found and num > 1:
            found["share_of_one_card"] = alone["step_s"] / (num * found["step_s"])


def tell(found: dict[str, Any]) -> str:
    """One cell: step, memory of each card, strategy, efficiency."""
    if "problem" in found:
        return "–" if found["problem"] == "more cards than samples" else found["problem"]
    share = found.get("share_of_one_card", found["efficiency"])
    shared = "" if found["strategy"] is None else f", {found['strategy']} {share:.0%}"
    return f"{found['step_s']:.3g} s, {format_bytes(found['peak_bytes'])}{shared}"


def tabulate(cases: list[Case]) -> dict[str, Any]:
    """Every case on every number of cards of every kind; a line as soon as it is known, then as tables."""
    tables: dict[str, Any] = {kind.card: {"network": kind.network, "rows": {}} for kind in KINDS}
    for case in cases:
        for kind in KINDS:
            row = {num: plan_for(case, kind, num) for num in NUMBERS}
            add_speedups(row)
            tables[kind.card]["rows"][case.name] = row
            print(f"{kind.card}: {_line(case.name, row)}", flush=True)
    for name, table in tables.items():
        print(f"\n**{name}**, {table['network']}\n")
        print(f"| Recipe | {' | '.join(map(str, NUMBERS))} |\n|---|{'---|' * len(NUMBERS)}")
        print("\n".join(_line(case, row) for case, row in table["rows"].items()))
    return tables


def _line(name: str, row: dict[int, dict[str, Any]]) -> str:
    return f"| {name} | {' | '.join(tell(found) for found in row.values())} |"


def published(table: Path) -> Iterator[dict[str, Any]]:
    """Published speeds on eight cards beside the predicted ones, of the group and of one card alone."""
    for row in read_rows(table):
        if row.group != "llm-foundry":
            continue
        alone, together = predict_eight(row)
        errors = [time_s / row.step_s - 1 for time_s in (alone, together)]
        print(
            f"{row.id} {row.model:9} {row.card:10} {row.rows:3} x {row.length} {row.num_micro_batches} micro-batches"
            f" {row.step_s:7.3f} s published, on one {alone:7.3f} ({errors[0]:+.0%}),"
            f" of eight {together:7.3f} ({errors[1]:+.0%})",
            flush=True,
        )
        told = {"model": row.model, "card": row.card, "published_s": row.step_s, "alone_s": alone}
        yield {"id": row.id, **told, "predicted_s": together, "error_alone": errors[0], "error": errors[1]}


def predict_eight(row: Row) -> tuple[float, float]:
    """Seconds of a step on one card, and of eight times as many samples in parts on eight with NVLink."""
    card = find(row.card)
    share = plan_of(row).model_copy(update={"strategy": "fsdp"})
    whole = share.model_copy(update={"total_batch_size": 8 * share.total_batch_size})
    trace = trace_plan(share, (8, 0), has_borders=False)
    # The catalogue's row of the A100 40GB stands for its PCIe version, too.
    link = None if card.nvlink_bytes_per_s else 240e9
    fabric = find_fabric(CardGroup(num=8, per_machine=8, link_bytes_per_s=link), card)
    found = predict_group_time(trace, whole, card, fabric, replace(default_efficiencies(card)))
    return found.time.step_s - found.exchange.exposed_s, found.time.step_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a case's name; nothing is written")
    parser.add_argument("--published", type=Path, help="a table of published measurements")
    arguments = parser.parse_args()
    if arguments.published:
        rows = list(published(arguments.published))
        for name in ("error_alone", "error"):
            errors = [row[name] for row in rows]
            print(f"{name}: median {statistics.median(errors):+.1%}, worst {max(errors, key=abs):+.1%}")
        write_result("scale_published", {"rows": rows})
        return
    cases = [case for case in CASES if arguments.only in case.name]
    tables = tabulate(cases)
    if not arguments.only:
        write_result("scale", tables)


if __name__ == "__main__":
    main()
