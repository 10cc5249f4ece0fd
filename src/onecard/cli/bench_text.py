"""A bench as a table, as bars, as JSON."""

import dataclasses
import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.report.bench_page import SpeedBar
from onecard.trials.sweep import name_of
from onecard.units import format_bytes, format_count

if TYPE_CHECKING:
    from onecard.spec import Plan, TimeForecast
    from onecard.trials.bench import Bench
    from onecard.trials.measured import Row

HEADER = (
    "",
    "setting",
    "tokens/s",
    "middle half",
    "planned",
    "step s",
    "memory",
    "planned",
    "of peak",
    "waits",
    "remarks",
)
# Rounds that differ by more than this say that the machine itself was not steady.
_UNSTEADY = 0.1


def table_rows(bench: "Bench") -> list[tuple[str, ...]]:
    """One row per setting below the header; `*` is the fastest, `=` what cannot be told from it."""
    return [HEADER, *(_cells(row) for row in bench.rows)]


def _cells(row: "Row") -> tuple[str, ...]:
    name, speed, step = name_of(row.setting), row.tokens_per_s, row.step_s
    if speed is None or step is None:
        return ("", name, *("-",) * 8, row.problem or "")
    memory = row.plan.forecast.memory if row.plan and row.plan.forecast else None
    return (
        "*" if row.is_best else "=" if row.is_near_best else "",
        name,
        f"{speed.median:,.0f}",
        f"{speed.low_quarter:,.0f}-{speed.high_quarter:,.0f}",
        _planned_speed(row),
        f"{step.median:.3g}",
        format_bytes(row.peak_bytes),
        format_bytes(memory.peak_bytes) if memory else "-",
        f"{row.share_of_peak:.1%}",
        f"{row.wait_share:.1%}",
        "; ".join(_remarks(row)),
    )


def _planned_speed(row: "Row") -> str:
    time = _time_of(row)
    return f"{time.tokens_per_s:,.0f}" if time else "-"


def _time_of(row: "Row") -> "TimeForecast | None":
    return row.plan.forecast.time if row.plan and row.plan.forecast else None


def _remarks(row: "Row") -> list[str]:
    found = []
    if row.plan is not None:
        found.append(_batch_of(row.plan))
        found.append("compiled" if row.is_compiled else "the compiler failed" if row.plan.torch_compile else "eager")
    if row.problem:
        found.append(f"then {row.problem}")
    if row.is_synthetic:
        found.append("random tokens")
    if len(row.rounds) > 1 and max(row.rounds) / min(row.rounds) - 1 > _UNSTEADY:
        found.append("rounds " + ", ".join(f"{speed:,.0f}" for speed in row.rounds))
    return found


def _batch_of(plan: "Plan") -> str:
    return f"batch {plan.total_batch_size} = {plan.num_micro_batches} x {plan.micro_batch_size}"


def bench_lines(bench: "Bench") -> list[str]:
    """What the table means, on what it rests, and what it does not say."""
    lines = [*_verdict(bench), *bench.notes]
    if bench.num_rounds < bench.num_wanted:
        lines.append(f"The time allowed for {bench.num_rounds} of {bench.num_wanted} rounds.")
    done = [(row, row.plan) for row in bench.rows if row.tokens_per_s is not None and row.plan is not None]
    if not done:
        return lines
    plan, num_steps = done[0][1], sum(row.num_steps for row, _ in done)
    device = plan.forecast.card if plan.forecast else plan.device
    lines.append(
        f"Measured on {device} with PyTorch {version('torch')}: medians of {num_steps} steps after warm-up; settings "
        f"took turns in {bench.num_rounds} round{'s' * (bench.num_rounds > 1)}, each time in a process of their own."
    )
    lines.append(_peak_line(done))
    if len({plan.total_batch_size for _, plan in done}) > 1:
        lines.append("The batch of a step differs between settings: they do not learn the same per token.")
    if any(row.is_synthetic for row, _ in done):
        lines.append("The text is not on this machine: random tokens stood in, so waiting for data was not measured.")
    if plan.device == "cpu":
        lines.append("Memory is what the process held at most, libraries included.")
    else:
        lines.append("Memory is what PyTorch reserved in steps; the plan counts evaluation, samples and saving, too.")
    return lines


def _peak_line(done: "list[tuple[Row, Plan]]") -> str:
    work = [plan.flops_per_token for _, plan in done]
    told = _flops(max(work)) if math.isclose(min(work), max(work)) else f"{_flops(min(work))} to {_flops(max(work))}"
    peaks = [peak for row, _ in done for peak in row.peak_flops]
    at_rest = ", 4 N for those at rest" if any(plan.adapt is not None for _, plan in done) else ""
    precisions = ", ".join(dict.fromkeys(row.peak_precision for row, _ in done))
    return (
        f"Share of peak: a token takes 6 N + 6 layers x width x length = {told} (N: parameters of matrices, the head "
        f"once{at_rest}); peak is a large matrix product in {precisions}, {_range(peaks)} in these processes, of which "
        "the best counts for each setting."
    )


def _verdict(bench: "Bench") -> list[str]:
    best = bench.best
    if best is None or best.tokens_per_s is None:
        return ["No setting could be measured."]
    if len(bench.rows) == 1:
        return []
    near = [name_of(row.setting) for row in bench.rows if row.is_near_best]
    text = f"Fastest: {name_of(best.setting)}, {best.tokens_per_s.median:,.0f} tokens/s"
    return [text + (f"; the spread between rounds does not tell it from {', '.join(near)}." if near else ".")]


def speed_bars(bench: "Bench") -> list[SpeedBar]:
    """The table as bars: measured, its spread, and what was planned."""
    bars = []
    for row in bench.rows:
        time, speed = _time_of(row), row.tokens_per_s
        bars.append(
            SpeedBar(
                label=name_of(row.setting),
                value=speed.median if speed else None,
                spread=(speed.low_quarter, speed.high_quarter) if speed else None,
                planned=time.tokens_per_s if time and speed else None,
                note=(row.problem or "")
                if speed is None
                else f"{format_bytes(row.peak_bytes)}, {row.share_of_peak:.1%} of peak",
                is_best=row.is_best,
            )
        )
    return bars


def bench_document(bench: "Bench", picture: Path) -> dict[str, Any]:
    """The whole bench for programs: tokens/s, seconds, bytes, FLOP/s."""
    return {
        "recipe": bench.source,
        "seconds": bench.seconds,
        "num_rounds": bench.num_rounds,
        "best": None if bench.best is None else dict(bench.best.setting),
        "rows": [_row_document(row) for row in bench.rows],
        "notes": bench_lines(bench),
        "page": str(picture),
    }


def _row_document(row: "Row") -> dict[str, Any]:
    document = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "plan"}
    document["setting"] = dict(row.setting)
    for name in ("tokens_per_s", "step_s"):
        document[name] = None if document[name] is None else dataclasses.asdict(document[name])
    if row.plan is not None:
        forecast = row.plan.forecast
        document["planned"] = forecast.model_dump(mode="json", include={"memory", "time"}) if forecast else None
        document["flops_per_token"] = row.plan.flops_per_token
        document["settings"] = {
            name: getattr(row.plan, name)
            for name in ("device", "precision", "torch_compile", "attn_implementation", "gradient_checkpointing")
        } | {"micro_batch_size": row.plan.micro_batch_size, "total_batch_size": row.plan.total_batch_size}
    return document


def _flops(value: float) -> str:
    return f"{format_count(value)}FLOP".replace("BFLOP", " GFLOP").replace("MFLOP", " MFLOP").replace("KFLOP", " kFLOP")


def _range(peaks: list[float]) -> str:
    low, high = min(peaks) / 1e12, max(peaks) / 1e12
    return f"{high:.3g} TFLOP/s" if math.isclose(low, high, rel_tol=0.01) else f"{low:.3g} to {high:.3g} TFLOP/s"
