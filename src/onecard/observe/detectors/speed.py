"""Where the time goes: no GPU, waiting for data, saving, evaluating."""

import math

from onecard.observe.detectors.catalogue import instead, make_finding
from onecard.observe.detectors.history import OTHERS_CPU_SHARE, History, mean, median
from onecard.observe.detectors.phrases import phrase
from onecard.spec import Finding
from onecard.units import format_seconds

_WINDOW = 50
_WAITING_SHARE = 0.25
# A GPU computes while Python waits for the next batch: only a step that is nearly all waiting tells by itself.
_SURE_WAITING_SHARE = 0.8
_BUSY_SHARE = 0.85
_SAVING_SHARE, _AIMED_SAVING_SHARE = 0.05, 0.01
_EVALUATING_SHARE, _AIMED_EVALUATING_SHARE = 0.3, 0.1
_LEAST_TIMES = 3


def find_unused_gpu(history: History) -> Finding | None:
    here = history.surroundings
    if history.is_on_gpu or not here.gpus or here.is_device_asked or not history.steps:
        return None
    build = phrase("built-for-cuda", version=here.torch_cuda) if here.torch_cuda else phrase("built-without-cuda")
    return make_finding(
        "gpu-unused",
        f"{phrase('on-the-cpu')}; {phrase('has-cards', names=' and '.join(here.gpus))}; {build}",
        f"device: cuda, {phrase('seeing-pytorch')}",
        effect=phrase("plan-for-card"),
    )


def find_starvation(history: History) -> Finding | None:
    steps = history.steps[-_WINDOW:]
    if not history.is_long_enough():
        return None
    if not history.is_on_gpu and history.others_cpu_share >= OTHERS_CPU_SHARE:
        return None  # whoever prepares batches waits for a core as all else does
    # One hiccup, of a network disk or a laptop that slept, may be longer than all other steps together.
    kept = sorted(steps, key=lambda step: step.wait_s)[:-1]
    step_s = sum(step.step_s for step in kept)
    share = min(1.0, sum(step.wait_s for step in kept) / max(step_s, 1e-9))
    if share < _WAITING_SHARE or (history.is_on_gpu and share < _SURE_WAITING_SHARE and not _is_idle(history)):
        return None
    each_s, number = step_s / len(kept), history.plan.dataloader_num_workers
    wanted = min(max(2, 2 * number), max(2, history.surroundings.num_cores))
    if wanted > number:
        setting = instead("dataloader_num_workers", wanted, number)
    else:
        ahead = history.plan.dataloader_prefetch_factor
        setting = f"{instead('dataloader_prefetch_factor', 4 * ahead, ahead)}, {phrase('faster-disk')}"
    return make_finding(
        "starved-by-data",
        phrase("waiting", share=f"{share:.0%}", num=len(steps), waited=f"{each_s * share:.3g}", each=f"{each_s:.3g}"),
        setting,
        effect=phrase("without-waiting", seconds=f"{each_s * (1 - share):.3g}"),
    )


def _is_idle(history: History) -> bool:
    shares = [reading.gpu_share for reading in history.devices[-6:] if reading.gpu_share is not None]
    return len(shares) >= 2 and mean(shares) < _BUSY_SHARE * history.may_compute


def find_frequent_saving(history: History) -> Finding | None:
    if not history.is_long_enough() or len(history.saves) < _LEAST_TIMES:
        return None
    share = history.saving_s / history.elapsed_s
    if share < _SAVING_SHARE:
        return None
    return make_finding(
        "saving-too-often",
        phrase(
            "saving",
            num=len(history.saves),
            time=format_seconds(history.elapsed_s),
            share=f"{share:.0%}",
            each=f"{history.saving_s / len(history.saves):.2g}",
        ),
        _rarer_saving(history),
        effect=phrase("saving-then", share=f"{_AIMED_SAVING_SHARE:.0%}"),
    )


def _rarer_saving(history: History) -> str:
    """The interval of what asked for most of the checkpoints, so that saving takes a hundredth of the time."""
    plan, each_s = history.plan, history.saving_s / len(history.saves)
    rest_s = max(1e-9, history.elapsed_s - history.saving_s) / history.num_steps
    wanted = math.ceil(each_s / (_AIMED_SAVING_SHARE * rest_s))
    intervals: dict[str, tuple[str, int, float]] = {
        "interval": ("save_steps", wanted, plan.save_steps),
        "best": ("eval_steps", wanted, plan.eval_steps),
        "clock": ("save_minutes", math.ceil(each_s / (60 * _AIMED_SAVING_SHARE)), plan.save_minutes or 0),
    }
    reason = max(intervals, key=lambda reason: sum(save.reason == reason for save in history.saves))
    key, number, now = intervals[reason]
    return instead(key, max(number, int(now) + 1), f"{now:g}")


def find_frequent_evaluation(history: History) -> Finding | None:
    """Evaluations and samples that take much of the time; those are named that do."""
    plan, num_times = history.plan, len(history.evaluations) + history.num_samplings
    if not history.is_long_enough() or num_times < _LEAST_TIMES:
        return None
    share = min(1.0, (history.evaluating_s + history.sampling_s) / history.elapsed_s)
    if share < _EVALUATING_SHARE:
        return None
    # What stays the same is the time of all else, so shares are compared as parts of it.
    factor = (1 / _AIMED_EVALUATING_SHARE - 1) / (1 / min(share, 0.99) - 1)
    parts = (
        ("eval_steps", plan.eval_steps, history.evaluating_s),
        ("sample_steps", plan.sample_steps, history.sampling_s),
    )
    least_s = 0.5 * _AIMED_EVALUATING_SHARE * history.elapsed_s
    settings = [instead(key, math.ceil(now * factor), now) for key, now, seconds in parts if now and seconds > least_s]
    return make_finding(
        "evaluating-too-often",
        phrase(
            "evaluating",
            num=len(history.evaluations),
            samples=history.num_samplings,
            time=format_seconds(history.elapsed_s),
            share=f"{share:.0%}",
        ),
        ", ".join(settings),
        effect=phrase("evaluating-then", share=f"{_AIMED_EVALUATING_SHARE:.0%}"),
    )


def typical_step_s(history: History) -> float:
    """Median seconds of the last steps: a step that met a compiler or an evaluation does not count."""
    return median(step.step_s for step in history.steps[-_WINDOW:])
