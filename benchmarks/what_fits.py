"""What popular guides claim for small cards, beside what the plan says: memory and time, without a GPU.

    python benchmarks/what_fits.py                 # everything; minutes, an instant where traces are cached
    python benchmarks/what_fits.py --compiled      # compiled variants of the claims' runs, too, and recipes as they are
    python benchmarks/what_fits.py --only gpt2     # rows whose name holds this; nothing is written

`runs` holds, for every run that guides describe, their claims and the plan's answer: the fastest settings at the
micro-batch as named that stay under a limit of reserved memory, and the fastest settings without any limit on the same
card. `recipes` holds the shipped recipes on their cards. Without --compiled all of it is eager.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from plans import Setting
from record import write_result

import onecard
from onecard import api
from onecard.errors import DoesNotFitError
from onecard.hardware import find_card
from onecard.planner.device import Target, target_of_card
from onecard.planner.forecast import forecast
from onecard.spec import Forecast, Plan
from onecard.units import GIB

GB = 10**9
# Without a limit: larger than any card.
_UNLIMITED = 10**15
# A larger micro-batch, for the fastest settings without a limit.
_LARGER = 4
_ALONE: dict[str, Any] = {"dataset": "python-stdlib"}


@dataclass(frozen=True)
class Run:
    """A run that guides describe: on which card, what they claim for it, and the limit it shall keep.

    The limit is for what the allocator reserves, without CUDA's context. Ranges of claims are from and to.
    """

    name: str
    card: str
    setting: Setting
    limit_bytes: float
    claims: dict[str, Any]


def list_runs() -> list[Run]:
    """The runs of the claims, one by one."""
    laptop, desktop = "rtx-4060-laptop", "rtx-3060-12gb"
    pretrain = {"bytes": [3 * GB, 4 * GB], "tokens_per_s": [2500, 3500], "steps": 10000, "hours": [0.5, 40 / 60]}
    smol = {"bytes": [4 * GB, 5 * GB], "steps": 320, "hours": [2, 3]}

    def claim(gigabytes: float, steps_per_s: float) -> dict[str, Any]:
        return {"bytes": [gigabytes * GB] * 2, "steps_per_s": steps_per_s}

    # Steps of two micro-batches or more: the gradients of the first lie beside the activations of the next.
    dialogue = Setting("DialoGPT-medium", 4, 512, num_micro_batches=2)
    tiny = Setting("TinyLlama-1.1B", 2, 256, "qlora", num_micro_batches=2)
    return [
        Run("rtx-5060-pretrain", "rtx-5060", Setting("qwen3-75M", 24, 1024, dropout=0.1), 3.5 * GB, pretrain),
        Run("SmolLM2-135M full", laptop, Setting("SmolLM2-135M", 4, 1024, num_micro_batches=16), 3.2 * GB, smol),
        Run("TinyLlama-1.1B QLoRA", desktop, tiny, 2.0 * GB, claim(10, 0.5)),
        Run("distilgpt2 full", desktop, Setting("distilgpt2", 8, 512, num_micro_batches=2), 2.2 * GB, claim(4, 2)),
        Run("gpt2 full", desktop, Setting("gpt2", 6, 512, num_micro_batches=2), 2.8 * GB, claim(6, 1.5)),
        Run("DialoGPT-medium full", desktop, dialogue, 7 * GB, claim(8, 1)),
        Run("DialoGPT-medium LoRA", desktop, dialogue.but(method="lora"), 2 * GB, {}),
    ]


def answer(run: Run, *, with_compiler: bool) -> dict[str, Any]:
    """What the plan says: the best under the limit, the best without, and every variant that was looked at."""
    target = target_of_card(find_card(run.card), "linux")
    variants = [_row(setting, target) for setting in _variants(run.setting, with_compiler)]
    named = [row for row in variants if row["micro_batch"] == run.setting.micro_batch]
    within = [row for row in named if row["peak_bytes"] <= run.limit_bytes]
    fastest = max(variants, key=_speed)
    best = max(within, key=_speed) if within else min(named, key=lambda row: row["peak_bytes"])
    return {
        "card": target.name,
        "usable_bytes": target.limit_bytes,
        "setting": run.setting.name,
        "claims": run.claims | _arithmetic(run),
        "limit_bytes": run.limit_bytes,
        "is_reached": bool(within),
        "best": best,
        "fastest": fastest,
        "share_of_fastest": _speed(best) / _speed(fastest),
        "variants": variants,
    }


def _variants(setting: Setting, with_compiler: bool) -> Iterator[Setting]:
    for is_compiled in (False, True) if with_compiler else (False,):
        # Compiled, deep models are known only where all layers are alike.
        for recomputes in (True, False) if is_compiled else (True, 0.75, 0.5, 0.25, False):
            yield setting.but(is_compiled=is_compiled, recomputes=recomputes)
    accumulated = max(1, setting.num_micro_batches // _LARGER)
    yield setting.but(micro_batch=_LARGER * setting.micro_batch, num_micro_batches=accumulated)


def _ask(setting: Setting, target: Target, limit_bytes: float = _UNLIMITED) -> Forecast:
    return forecast(setting.plan("cuda:0", int(limit_bytes)), target).forecast


def _row(setting: Setting, target: Target) -> dict[str, Any]:
    found = _ask(setting, target)
    told = {
        "name": setting.name,
        "micro_batch": setting.micro_batch,
        "recomputes": setting.recomputes,
        "is_compiled": setting.is_compiled,
        **_figures(found),
        "fits_card": _ask(setting, target, target.limit_bytes or 0).memory.fits,
    }
    print(f"  {setting.name:56} {tell(told)}", flush=True)
    return told


def _figures(found: Forecast) -> dict[str, Any]:
    memory, time = found.memory, found.time
    assert time is not None
    keys = ("peak_bytes", "peak_low_bytes", "peak_high_bytes", "allocated_bytes", "breakdown", "peak_phase", "note")
    speeds = ("step_s", "step_low_s", "step_high_s", "tokens_per_s", "limited_by", "share_of_peak")
    return {key: getattr(memory, key) for key in keys} | {key: getattr(time, key) for key in speeds}


def _speed(row: dict[str, Any]) -> float:
    return float(row["tokens_per_s"])


def _arithmetic(run: Run) -> dict[str, Any]:
    """What the claims amount to: tokens of a step and of the run, and the tokens per second that follow."""
    setting, claims = run.setting, run.claims
    tokens_per_step = setting.micro_batch * setting.num_micro_batches * setting.length
    found: dict[str, Any] = {"tokens_per_step": tokens_per_step}
    if "hours" in claims:
        tokens = claims["steps"] * tokens_per_step
        rates = [tokens / (3600 * hours) for hours in reversed(claims["hours"])]
        found |= {"tokens": tokens, "tokens_per_s_of_hours": rates}
        card = find_card(run.card)
        flops = setting.plan("cuda:0", _UNLIMITED).flops_per_token
        peak = card.flops_16bit or card.fp32_flops
        found |= {
            "flops_per_token": flops,
            "card_flops": peak,
            "share_of_peak": [rate * flops / peak for rate in rates],
        }
        if "tokens_per_s" in claims:
            low, high = claims["tokens_per_s"]
            found |= {"hours_of_tokens_per_s": [tokens / (3600 * high), tokens / (3600 * low)]}
    if "steps_per_s" in claims:
        # Of one micro-batch each, as the guides' scripts count them.
        found |= {"tokens_per_s_of_steps": claims["steps_per_s"] * setting.micro_batch * setting.length}
    return found


# Settings of common scripts for the A6000 beside those of the recipe; see docs/a6000-pretrain.md.
_BEFORE: dict[str, Any] = {
    "per_device_train_batch_size": 12,
    "gradient_accumulation_steps": 10,
    "precision": "fp32",
    "torch_compile": False,
    "optim": "adamw",
}


def list_recipes() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Name of the row, recipe, card and changes."""
    for card in ("rtx-5060", "rtx-4060-laptop"):
        yield f"rtx-5060-pretrain on {card}", "rtx-5060-pretrain", card, {}
    for size in ("small", "medium", "large"):
        yield f"a6000-pretrain {size}", "a6000-pretrain", "a6000", {"size": size}
    yield "a6000-pretrain small, as before", "a6000-pretrain", "a6000", {"size": "small"} | _BEFORE
    yield "a6000-pretrain medium, as before", "a6000-pretrain", "a6000", {"size": "medium"} | _BEFORE
    yield "shakespeare-char on rtx-3060-12gb", "shakespeare-char", "rtx-3060-12gb", {}
    yield "small-gpu-pretrain on rtx-4060-laptop", "small-gpu-pretrain", "rtx-4060-laptop", {}
    yield "large-gpu-pretrain on rtx-3090", "large-gpu-pretrain", "rtx-3090", {}
    yield from _list_named()


def _list_named() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Recipes of the claims' runs under the limits of `list_runs`, a step of several micro-batches and of one."""
    desktop = "rtx-3060-12gb"
    for recipe, card, method, micro, length, gigabytes in (
        ("rtx-4060-laptop-sft", "rtx-4060-laptop", "full", 4, 1024, 3.2),
        ("rtx-3060-tinyllama", desktop, "qlora", 2, 256, 2.0),
        ("rtx-3060-distilgpt2", desktop, "full", 8, 512, 2.2),
        ("rtx-3060-gpt2", desktop, "full", 6, 512, 2.8),
        ("rtx-3060-dialogpt-medium", desktop, "full", 4, 512, 7.0),
        ("rtx-3060-dialogpt-medium", desktop, "lora", 4, 512, 2.0),
    ):
        given = {"method": method, "per_device_train_batch_size": micro, "max_seq_length": length}
        given["memory_limit_gb"] = gigabytes * GB / GIB
        name = f"{recipe} {method} {micro} x {length} in {gigabytes} GB"
        yield name, recipe, card, given
        yield f"{name}, one micro-batch", recipe, card, given | {"total_batch_size": micro}


def ask_recipe(recipe: str, card: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What `onecard plan RECIPE --card CARD` says, with a stand-in where the user has to bring a text."""
    alone = {} if "method" in changes else _ALONE
    try:
        made: Plan = api.plan(onecard.load_recipe(recipe, **alone, **changes), card=card, platform="linux")
    except DoesNotFitError as error:
        if error.plan is None:
            raise
        made = error.plan
    assert made.forecast is not None
    assert made.forecast.time is not None
    return {
        "card": made.forecast.card,
        "batch": f"{made.micro_batch_size} x {made.num_micro_batches} x {made.max_seq_length}",
        "fits": made.forecast.memory.fits,
        "recomputes": made.gradient_checkpointing,
        "is_compiled": made.torch_compile,
        "steps": made.schedule.num_steps,
        "parameters": made.model.num_parameters,
        **_figures(made.forecast),
        "total_s": made.forecast.time.total_s,
    }


def tell(row: dict[str, Any]) -> str:
    """One line: memory with its band, step and speed."""
    low, peak, high = (row[key] / GB for key in ("peak_low_bytes", "peak_bytes", "peak_high_bytes"))
    memory = f"{peak:6.2f} GB ({low:.2f} to {high:.2f}) {row['peak_phase']:8}"
    time = f"{row['step_s']:7.3f} s ({row['step_low_s']:.3f} to {row['step_high_s']:.3f}) {row['tokens_per_s']:8,.0f}/s"
    return f"{memory} {time} {row['share_of_peak']:4.0%} {row['limited_by']}{' BOUND' if row['note'] else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the rows to ask about; nothing is written")
    parser.add_argument("--compiled", action="store_true", help="compiled variants, too: up to a minute for each")
    arguments = parser.parse_args()
    only = arguments.only
    runs: dict[str, Any] = {}
    for run in list_runs():
        if only in run.name:
            print(run.name, flush=True)
            row = runs[run.name] = answer(run, with_compiler=arguments.compiled)
            verdict = "keeps" if row["is_reached"] else "MISSES"
            print(
                f"  {verdict} {run.limit_bytes / GB} GB with {row['best']['name']}, "
                f"{row['share_of_fastest']:.0%} of the fastest, {row['fastest']['name']}"
            )
    recipes: dict[str, Any] = {}
    for name, recipe, card, changes in list_recipes():
        if only in name:
            if not arguments.compiled:
                changes = changes | {"torch_compile": False}
            row = recipes[name] = ask_recipe(recipe, card, changes)
            verdict = "fits" if row["fits"] else "MISSES"
            recomputed = f"recomputes {row['recomputes']}"
            print(
                f"{name:40} {row['batch']:16} {tell(row)} {row['total_s'] / 3600:.2f} h {verdict} {recomputed}",
                flush=True,
            )
    if not only:
        write_result("what_fits", {"runs": runs, "recipes": recipes})


if __name__ == "__main__":
    main()
