"""What the planner predicts for published runs, beside what was published: peak memory, without a GPU.

Each row is a script written anew from its published source, recorded on tensors without storage and replayed through
the simulated allocator; nothing is fitted. PyTorch is today's, not the version of the row. Rows that were off while the
replicas were written have shown what was missing there; the adapter rows and the vision transformer stand as they were
first predicted. Takes some ten minutes on a core.

    python benchmarks/planner_published.py [part of a row's name ...]
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import published_litgpt as litgpt
import published_rasbt as rasbt
import published_vit as vit
from record import write_result
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.model.target import traced_as
from onecard.planner.as_cuda import SCRATCH, as_cuda
from onecard.planner.compiled import compiling_for_card
from onecard.planner.recorder import Recorder
from onecard.planner.replay import replay
from onecard.planner.trace import Program, record_program
from onecard.units import GIB

# Compute capability 8.x; see onecard/planner/device.py.
_WORKSPACE_BYTES = 8_519_680
_A100, _A10G = (8, 0), (8, 6)
_RASBT = "github.com/rasbt/LLMs-from-scratch@28c65cdfbc ch05/10_llm-training-speed/README.md"
_TABLES = "github.com/Lightning-AI/litgpt@26857050fe tutorials/resource-tables.md"
_CONFIG_HUB = "github.com/Lightning-AI/litgpt@00af8b0d (27 September 2024) config_hub/finetune/README.md"
_VIT = "github.com/rasbt/pytorch-memory-optim (14 July 2023) logs.md; the card is not named there"
_RASBT_GIB = (26.2617, 26.2422, 26.2422, 26.2422, 13.7871, 11.5645, 5.9004)
_RASBT_COMPILED_GIB = (6.1875, 5.8906, 22.5078)
_TABLES_GB = (
    *(4.82, 3.78, 3.72, 6.76, 10.68),
    *(9.69, 6.35, 6.19, 12.10, 16.92),
    *(21.30, 14.14, 13.84, 29.07),
    *(38.12, 23.14, 22.55),
)


_ADAPTERS_GB = (9.10, 5.65, 5.48, 19.98, 12.68, 12.38, 10.71, 7.41, 7.25, 25.51, 18.30, 17.98)


@dataclass(frozen=True)
class Case:
    """One published row. `metric` is `reserved` or `allocated`: torch.cuda.memory_reserved or max_memory_allocated."""

    name: str
    group: str
    what: str
    published_bytes: float
    metric: str
    capability: tuple[int, int]
    source: str
    make_program: Callable[[], Program]
    is_compiled: bool = False


def list_cases() -> list[Case]:
    """Every row that has a replica."""
    return [*_rasbt_cases(), *_table_cases(), *_config_hub_cases(), *_vit_cases()]


def _rasbt_cases() -> list[Case]:
    def case(name: str, variant: rasbt.Variant, gibibytes: float) -> Case:
        what = f"GPT-2 124M, {variant.batch} x 1024, {'bf16' if variant.is_bf16 else 'fp32'}, eager"
        return Case(
            name,
            "rasbt eager",
            what,
            gibibytes * GIB,
            "reserved",
            _A100,
            _RASBT,
            lambda: rasbt.make_program(variant),
        )

    def compiled(name: str, variant: rasbt.Variant, gibibytes: float) -> Case:
        what = f"GPT-2 124M, {variant.batch} x 1024, bf16, compiled, vocabulary {variant.vocabulary}"
        place = (_A100, _RASBT, lambda: rasbt.make_compiled_program(variant))
        return Case(name, "rasbt compiled", what, gibibytes * GIB, "reserved", *place, is_compiled=True)

    return [
        *(case(*row, gib) for row, gib in zip(rasbt.EAGER.items(), _RASBT_GIB, strict=True)),
        *(compiled(*row, gib) for row, gib in zip(rasbt.COMPILED.items(), _RASBT_COMPILED_GIB, strict=True)),
    ]


def _table_cases() -> list[Case]:
    rows = zip(litgpt.RESOURCE_TABLES.items(), _TABLES_GB, strict=True)
    cases = [_litgpt_case(name, *row, gb, "litgpt LoRA", _A100, _TABLES) for (name, row), gb in rows]
    rows = zip(litgpt.ADAPTER_TABLES.items(), _ADAPTERS_GB, strict=True)
    return cases + [_litgpt_case(name, *row, gb, "litgpt adapter", _A100, _TABLES) for (name, row), gb in rows]


def _config_hub_cases() -> list[Case]:
    rows = litgpt.CONFIG_HUB.items()
    return [_litgpt_case(name, *row, "litgpt hub", _A10G, _CONFIG_HUB) for name, row in rows]


def _vit_cases() -> list[Case]:
    def case(name: str, variant: vit.Variant, gigabytes: float) -> Case:
        what = f"ViT-L/16, {variant.batch} x 197, {'bf16' if variant.is_bf16 else 'fp32'}, eager"
        place = (_A100, _VIT, lambda: vit.make_program(variant))
        return Case(name, "vision transformer", what, gigabytes * 1e9, "reserved", *place)

    return [case(name, *row) for name, row in vit.ROWS.items()]


def _litgpt_case(
    name: str,
    model: str,
    tuning: litgpt.Tuning,
    gigabytes: float,
    *place: Any,
) -> Case:
    group, capability, source = place
    method = f"adapter {tuning.adapter}" if tuning.adapter else f"LoRA {tuning.rank}" if tuning.rank else "full"
    what = f"{model}, {tuning.batch} x {tuning.longest}, {method} {tuning.quantization}".strip()
    return Case(
        name,
        group,
        what,
        gigabytes * 1e9,
        "allocated",
        capability,
        source,
        lambda: litgpt.make_program(litgpt.SHAPES[model], tuning),
    )


def predict(case: Case) -> dict[str, Any]:
    """Bytes of the row by its own metric, published and predicted."""
    recorder = Recorder(SCRATCH)
    compiler = compiling_for_card(recorder.count_kernel) if case.is_compiled else nullcontext()
    with FakeTensorMode(), traced_as("cuda"), as_cuda(case.capability), compiler:
        trace = record_program(case.make_program(), recorder=recorder)
    peak = replay(trace, _WORKSPACE_BYTES)
    predicted = peak.reserved_bytes if case.metric == "reserved" else peak.allocated_bytes
    return {
        "what": case.what,
        "group": case.group,
        "metric": case.metric,
        "predicted_bytes": predicted,
        "published_bytes": round(case.published_bytes),
        "error": predicted / case.published_bytes - 1,
        "source": case.source,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    rows = {}
    for case in list_cases():
        if names and not any(part in case.name for part in names):
            continue
        row = rows[case.name] = predict(case)
        predicted, published = (row[f"{side}_bytes"] / 1e9 for side in ("predicted", "published"))
        print(f"{case.name:24} {case.what:44} {predicted:7.3f} {published:7.3f} GB {row['error']:+7.2%}", flush=True)
    groups = {}
    for group in {row["group"]: None for row in rows.values()}:
        errors = [abs(row["error"]) for row in rows.values() if row["group"] == group]
        median, worst = statistics.median(errors), max(errors)
        groups[group] = {"rows": len(errors), "median": median, "worst": worst}
        print(f"{group:24} {len(errors)} rows, median {median:.2%}, worst {worst:.2%}")
    if not names:
        write_result("planner_published", {"groups": groups, "rows": rows})


if __name__ == "__main__":
    main()
