"""How near the planner comes to this GPU: predicted and measured peak memory and step time over a grid of settings.

Every row is a run in a process of its own, so that it starts with an empty allocator, and is written as soon as it is
done; rows that are there are not measured again, so the same command goes on where it was cut short. Each setting runs
twice: free, and as if on a card with 2 % more memory than the plan asks for, where a wrong plan ends in an error.

    python benchmarks/planner_accuracy.py --minutes 9            # begins no row after so many; call it until it is done
    python benchmarks/planner_accuracy.py --only TinyLlama       # rows whose name holds this
    python benchmarks/planner_accuracy.py --list                 # the grid

Without a GPU the same command compares what the planner traces on tensors without storage with what real steps on the
CPU allocate, storage by storage and in order, for the grid with its shapes scaled down.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import torch
from plans import SHAPES, Setting
from record import RESULTS, describe_machine, read_rows, save_result
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.data import Batch
from onecard.hardware import probe_machine
from onecard.planner.calibrate import Measured, calibrate
from onecard.planner.device import Target, find_target
from onecard.planner.efficiency import default_efficiencies
from onecard.planner.forecast import forecast
from onecard.planner.roofline import predict_time
from onecard.planner.trace import Trace, record_plan
from onecard.planner.trace_cache import trace_cached
from onecard.run.probe import probe_worst_case
from onecard.spec import Plan
from onecard.training.assemble import assemble
from onecard.training.state import TrainState
from onecard.training.step import place, train_step

_DEVICE = "cuda:0"
_NUM_WARMUP, _LEAST_STEPS, _LEAST_S = 4, 10, 5.0
# Of a capped row: cap by predicted peak.
_CAP_BY_PEAK = 1.02
_EQUAL = "equal to the byte"


def list_settings() -> Iterator[Setting]:
    """The grid: 23M to 1.1B parameters, lengths of 256 to 2048 tokens."""
    small, middle = Setting("qwen3-23M", 32, 256), Setting("qwen3-75M", 8, 1024)
    yield from (small, small.but(is_compiled=True))
    yield Setting("qwen3-23M", 8, 512, num_micro_batches=4)
    yield Setting("qwen3-23M", 16, 512, recomputes=True, precision="fp32")
    yield from (middle, middle.but(is_compiled=True), middle.but(precision="fp16"))
    yield from (middle.but(micro_batch=24, recomputes=True, is_compiled=compiled) for compiled in (False, True))
    yield from (middle.but(micro_batch=4, length=2048), middle.but(micro_batch=4, length=2048, is_compiled=True))
    yield from (Setting("distilgpt2", 8, 512), Setting("distilgpt2", 8, 512, is_compiled=True))
    gpt2 = Setting("gpt2", 6, 512)
    yield from (gpt2, gpt2.but(recomputes=True), gpt2.but(is_compiled=True), gpt2.but(num_micro_batches=4))
    yield from (gpt2.but(method="lora"), gpt2.but(method="qlora", length=1024))
    smol = Setting("SmolLM2-135M", 4, 1024)
    yield from (
        smol,
        smol.but(recomputes=True),
        smol.but(is_compiled=True),
        smol.but(recomputes=True, num_micro_batches=4),
    )
    yield from (smol.but(method="lora"), smol.but(method="qlora", length=2048, recomputes=True))
    dialogue = Setting("DialoGPT-medium", 4, 512)
    yield from (dialogue, dialogue.but(recomputes=True))
    yield from (dialogue.but(method="lora"), dialogue.but(method="lora", is_compiled=True))
    llama = Setting("TinyLlama-1.1B", 2, 256, "qlora")
    yield from (llama, llama.but(recomputes=True), llama.but(is_compiled=True))
    yield from (llama.but(micro_batch=4, length=1024, recomputes=True), llama.but(method="lora", length=1024))
    yield from (
        llama.but(method="full", length=512, recomputes=True),
        llama.but(method="full", micro_batch=1, length=2048),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the rows")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there already")
    parser.add_argument("--list", action="store_true", help="print the grid and stop")
    arguments = parser.parse_args()
    settings = [setting for setting in list_settings() if arguments.only in setting.name]
    if arguments.list:
        print("\n".join(setting.name for setting in settings))
        return
    has_gpu = torch.cuda.is_available()
    path = RESULTS / ("planner_accuracy.json" if has_gpu else "planner_accuracy_cpu.json")
    done = {} if arguments.again else read_rows(path)
    deadline = time.monotonic() + 60 * arguments.minutes
    if has_gpu:
        due = [Row(setting, is_capped) for setting in settings for is_capped in (False, True)]
    else:
        due = [Row(setting, False) for setting in settings]
    due = [row for row in due if row.name not in done]
    summarize = summarize_gpu if has_gpu else summarize_cpu
    for index, row in enumerate(due):
        if time.monotonic() > deadline:
            print(f"{len(due) - index} rows are left: the same command goes on with them")
            break
        done[row.name] = compare_on_gpu(row, done) if has_gpu else compare_on_cpu(row.setting)
        save_result(path, {"summary": summarize(done), "rows": done})
        print(f"{row.name:64} {tell(done[row.name])}", flush=True)
    for name, figures in summarize(done).items():
        print(f"{name:20} {json.dumps(figures)}")


@dataclass(frozen=True)
class Row:
    """A setting, free or under a cap."""

    setting: Setting
    is_capped: bool

    @property
    def name(self) -> str:
        return self.setting.name + (", capped" if self.is_capped else "")


def compare_on_gpu(row: Row, done: dict[str, Any]) -> dict[str, Any]:
    """Predicts and measures one row; one that cannot be run says why."""
    setting = row.setting
    if row.is_capped:
        free = done.get(setting.name, {}).get("predicted")
        if free is None:
            return {"error": "the row without a cap is missing"}
        setting = setting.but(limit_bytes=int(_CAP_BY_PEAK * free["peak_bytes"]))
    found: dict[str, Any] = {"setting": asdict(setting), "commit": describe_machine()["commit"]}
    predicted = run_alone(predict, setting)
    measured = predicted if "error" in predicted else run_alone(measure, setting)
    if "error" in measured:
        return found | {"error": measured["error"]}
    return found | {"predicted": predicted, "measured": measured} | _errors(predicted, measured)


def _errors(predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    if not (predicted["fits"] and measured["fits"]):
        return {"agrees_on_fitting": predicted["fits"] == measured["fits"]}
    peak = measured["peak_bytes"]
    found: dict[str, Any] = {
        "agrees_on_fitting": True,
        "memory_error": predicted["peak_bytes"] / peak - 1,
        "allocated_error": predicted["allocated_bytes"] / measured["allocated_bytes"] - 1,
        "is_memory_inside": predicted["peak_low_bytes"] <= peak <= predicted["peak_high_bytes"],
    }
    if predicted.get("step_s"):
        step_s = measured["step_s"]
        found["time_error"] = predicted["step_s"] / step_s - 1
        found["is_time_inside"] = predicted["step_low_s"] <= step_s <= predicted["step_high_s"]
    return found


def run_alone(work: Callable[[Setting], dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """Calls in a process of its own, which ends with it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, setting).result()
        except BrokenProcessPool as error:
            return {"error": f"the process died: {error}"}
        # A row must not end the grid, whatever it fails over.
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _plan_here(setting: Setting) -> tuple[Plan, Target]:
    target = find_target(_DEVICE, probe_machine())
    assert target.limit_bytes is not None
    return setting.plan(_DEVICE, target.limit_bytes), target


def predict(setting: Setting) -> dict[str, Any]:
    """What the planner says, and after how many seconds."""
    plan, target = _plan_here(setting)
    begin = time.perf_counter()
    found = forecast(plan, target)
    memory, times = found.forecast.memory, found.forecast.time
    keys = ("fits", "peak_bytes", "peak_low_bytes", "peak_high_bytes", "allocated_bytes", "peak_phase", "note")
    told: dict[str, Any] = {key: getattr(memory, key) for key in keys} | {"seconds": time.perf_counter() - begin}
    if times is None:
        return told
    return told | {key: getattr(times, key) for key in ("step_s", "step_low_s", "step_high_s", "limited_by")}


def measure(setting: Setting) -> dict[str, Any]:
    """Runs the probe of a run's worst case and then its steps; bytes are the most of all of that, loading included."""
    plan, _ = _plan_here(setting)
    torch.cuda.set_device(_DEVICE)
    total_bytes = torch.cuda.get_device_properties(_DEVICE).total_memory
    assert plan.memory_limit_bytes is not None
    torch.cuda.set_per_process_memory_fraction(min(1.0, plan.memory_limit_bytes / total_bytes), _DEVICE)
    try:
        state = assemble(plan)
        probe_worst_case(state)
        steps_s = _time_steps(state)
    except torch.OutOfMemoryError as error:
        return {"fits": False, "why": str(error).splitlines()[0]}
    return {
        "fits": True,
        "peak_bytes": torch.cuda.max_memory_reserved(),
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "num_retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "step_s": statistics.median(steps_s),
        "steps_s": [min(steps_s), max(steps_s)],
        "num_steps": len(steps_s),
    }


def _time_steps(state: TrainState) -> list[float]:
    """Seconds between the ends of successive steps on the device."""
    ends: list[torch.cuda.Event] = []
    begin = time.perf_counter()
    while len(ends) < _NUM_WARMUP + _LEAST_STEPS or time.perf_counter() - begin < _LEAST_S:
        batches = [place(_random_batch(state.plan), state) for _ in range(state.plan.num_micro_batches)]
        train_step(state, batches, 1e-5, max_grad_norm=state.plan.optimizer.max_grad_norm)
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
        if len(ends) == _NUM_WARMUP:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        elif len(ends) > _NUM_WARMUP:
            # As far ahead as a run is, which reads its statistics one step late.
            ends[-2].synchronize()
    torch.cuda.synchronize()
    kept = ends[_NUM_WARMUP - 1 :]
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(kept)]


def _random_batch(plan: Plan) -> Batch:
    """Words at random in rows of two documents each."""
    shape = (plan.micro_batch_size, plan.max_seq_length)
    ids = torch.randint(plan.corpus.vocab_size, shape)
    documents = torch.zeros(shape, dtype=torch.int32)
    documents[:, shape[1] // 2 :] = 1
    return Batch(ids, ids.roll(-1, 1), documents, ids.numel())


def summarize_gpu(rows: dict[str, Any]) -> dict[str, Any]:
    """Median and worst error and the share inside the band, of all rows and of each kind."""
    kinds = {
        "all": lambda name: True,
        "free": lambda name: "capped" not in name,
        "capped": lambda name: "capped" in name,
        "eager": lambda name: "eager" in name,
        "compiled": lambda name: "compiled" in name,
        **{method: lambda name, method=method: f" {method} " in name for method in ("full", "lora", "qlora")},
    }
    found = {kind: _summary([row for name, row in rows.items() if belongs(name)]) for kind, belongs in kinds.items()}
    return found | {"after calibration": _calibrated(rows)}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    told: dict[str, Any] = {"rows": len(rows), "failed": sum("error" in row for row in rows)}
    told["agree_on_fitting"] = sum(row.get("agrees_on_fitting", False) for row in rows)
    for kind in ("memory", "time"):
        with_error = [row for row in rows if f"{kind}_error" in row]
        if with_error:
            inside = sum(row[f"is_{kind}_inside"] for row in with_error) / len(with_error)
            told[kind] = _spread(row[f"{kind}_error"] for row in with_error) | {"share_inside": inside}
    return told


def _spread(errors: Iterable[float]) -> dict[str, float]:
    sizes = [abs(error) for error in errors]
    return {"median": statistics.median(sizes), "worst": max(sizes)}


def _calibrated(rows: dict[str, Any]) -> dict[str, Any]:
    """Errors of each model's free rows after a calibration by those of all other models."""
    card = find_target(_DEVICE, probe_machine()).card
    timed = [row for name, row in rows.items() if "time_error" in row and "capped" not in name]
    if card is None or len({row["setting"]["model"] for row in timed}) < 2:
        return {}
    before, traced = default_efficiencies(card), []
    for row in timed:
        plan, target = _plan_here(Setting(**row["setting"] | {"settings": ()}))
        assert target.capability is not None
        traced.append((row, plan, trace_cached(plan, target.capability)))
    errors = []
    for model in {row["setting"]["model"] for row in timed}:
        others = [
            Measured(row["measured"]["step_s"], predict_time(trace, plan, card, before).seconds)
            for row, plan, trace in traced
            if row["setting"]["model"] != model
        ]
        after = calibrate(before, others)
        for row, plan, trace in traced:
            if row["setting"]["model"] == model:
                errors.append(predict_time(trace, plan, card, after).step_s / row["measured"]["step_s"] - 1)
    return {"rows": len(errors), "time": _spread(errors)}


def compare_on_cpu(setting: Setting) -> dict[str, Any]:
    """Records the real step of a scaled setting, and the same on tensors without storage."""
    if setting.is_compiled:
        return {"result": "left out: on a CPU the compiler's kernels allocate where no dispatch mode sees it"}
    plan = scaled(setting).plan("cpu", 1)
    real = record_plan(plan)
    with FakeTensorMode():
        fake = record_plan(plan)
    found: dict[str, Any] = {"setting": asdict(scaled(setting)), "num_storages": len(real.record.sizes)}
    found |= {f"{kind}_bytes": sum(trace.record.sizes) for kind, trace in (("real", real), ("fake", fake))}
    return found | {"result": _EQUAL if fake == real else _difference(fake, real)}


def _difference(fake: Trace, real: Trace) -> str:
    pairs = zip(fake.record.sizes, real.record.sizes, strict=False)
    for number, (one, other) in enumerate(pairs):
        if one != other:
            return f"storage {number} ({real.record.phases[number]}): {one} bytes traced, {other} bytes real"
    lengths = len(fake.record.sizes), len(real.record.sizes)
    if lengths[0] != lengths[1]:
        return f"{lengths[0]} storages traced, {lengths[1]} real"
    return "the same storages in another order, or other work"


def scaled(setting: Setting) -> Setting:
    """The setting with two narrow layers, a small vocabulary and a sixteenth of the length."""
    shape = SHAPES[setting.model]
    if shape["model_type"] == "gpt2":
        changes: dict[str, Any] = {"n_layer": 2, "n_embd": 8 * shape["n_head"]}
    else:
        changes = {"num_hidden_layers": 2, "hidden_size": 8 * shape["num_attention_heads"]}
        changes |= {"intermediate_size": shape["intermediate_size"] // 16}
        changes |= {"head_dim": 8} if "head_dim" in shape else {}
    special = {key: 0 for key in ("bos_token_id", "eos_token_id") if key in shape}
    changes |= {"vocab_size": 1021} | special
    return setting.but(
        length=setting.length // 16, micro_batch=min(2, setting.micro_batch), settings=tuple(changes.items())
    )


def summarize_cpu(rows: dict[str, Any]) -> dict[str, Any]:
    """How many rows are equal, and which are not."""
    results = {name: row["result"] for name, row in rows.items()}
    left_out = [name for name, result in results.items() if result.startswith("left out")]
    differ = {name: result for name, result in results.items() if result != _EQUAL and name not in left_out}
    equal = len(results) - len(left_out) - len(differ)
    return {_EQUAL: equal, "differ": differ, "left out": len(left_out)}


def tell(row: dict[str, Any]) -> str:
    """One line on one row."""
    if "error" in row:
        return f"not run: {row['error']}"
    if "result" in row:
        return str(row["result"])
    predicted, measured = row["predicted"], row["measured"]
    if "memory_error" not in row:
        words = ("fits" if side["fits"] else "does not fit" for side in (predicted, measured))
        return "predicted: {}, measured: {}".format(*words)
    memory = f"{predicted['peak_bytes'] / 1e9:7.3f} {measured['peak_bytes'] / 1e9:7.3f} GB {row['memory_error']:+7.2%}"
    if "time_error" not in row:
        return memory
    return f"{memory}  {predicted['step_s'] * 1e3:8.1f} {measured['step_s'] * 1e3:8.1f} ms {row['time_error']:+7.2%}"


if __name__ == "__main__":
    main()
