"""Steady figures of one run: a whole `onecard.train` of so many steps, of which the first are not counted."""

import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import onecard
from onecard.observe.events import Event
from onecard.spec import Plan

# Nothing but training: an evaluation would be compiled anew for its own batch. One checkpoint is written at the end.
ALONE: dict[str, Any] = {
    "eval_fraction": 0.0,
    "eval_steps": 0,
    "save_steps": 0,
    "sample_prompts": [],
    "early_stopping_patience": None,
    "report_to": "none",
}


def measure_run(recipe: onecard.spec.Recipe, num_warmup: int) -> dict[str, Any]:
    """Trains a recipe to its end and gives what its steps after the first `num_warmup` were like.

    Memory is that of training alone: its peak is taken at each step's report, before evaluation begins.
    """
    watch = _Watch()
    started = time.perf_counter()
    _forget()
    with tempfile.TemporaryDirectory() as folder:
        onecard.train(recipe, output_dir=Path(folder) / "run", on_event=watch.receive, on_plan=watch.begin)
    steps = watch.steps[num_warmup:]
    return {
        **_settings_of(watch.plan),
        "tokens_per_s": statistics.median(step.tokens_per_s for step in steps),
        "slowest_and_fastest": [pick(step.tokens_per_s for step in steps) for pick in (min, max)],
        "step_s": statistics.median(step.step_s for step in steps),
        "share_of_peak": statistics.median(step.share_of_peak for step in steps),
        "peak_tflops": watch.plan.peak_flops / 1e12,
        "wait_share": sum(step.wait_s for step in steps) / sum(step.step_s for step in steps),
        "reserved_bytes": steps[-1].memory_bytes,
        "allocated_bytes": watch.allocated_bytes,
        "first_step_s": watch.steps[0].step_s,
        "first_loss": watch.steps[0].loss,
        "last_loss": watch.steps[-1].loss,
        "heldout_loss": watch.heldout_loss,
        "num_steps": len(watch.steps),
        "num_counted": len(steps),
        "findings": watch.findings,
        "whole_s": time.perf_counter() - started,
    }


class _Watch:
    """Collects the events of one run."""

    plan: Plan

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.findings: list[str] = []
        self.heldout_loss: float | None = None
        self.allocated_bytes: int | None = None

    def begin(self, plan: Plan, _: Path) -> None:
        self.plan = plan
        _forget()  # the planner's own measurement

    def receive(self, event: Event) -> None:
        if event.event == "step":
            self.steps.append(event)
            if self.plan.device != "cpu":
                self.allocated_bytes = torch.cuda.max_memory_allocated(self.plan.device)
        elif event.event == "evaluated":
            self.heldout_loss = event.loss
        elif event.event == "finished" and event.reason == "interrupted":
            raise KeyboardInterrupt  # onecard stops in good order, so the next row would begin
        elif event.event == "finding":
            self.findings.append(f"{event.symptom}: {event.evidence}")


def _forget() -> None:
    """Gives back what earlier runs of this process hold, so that a peak is that of one run."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _settings_of(plan: Plan) -> dict[str, Any]:
    return {
        "num_parameters": plan.model.num_parameters,
        "precision": plan.precision,
        "torch_compile": plan.torch_compile,
        "optim": plan.optimizer.name,
        "attn_implementation": plan.attn_implementation,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "max_seq_length": plan.max_seq_length,
        "micro_batch_size": plan.micro_batch_size,
        "num_micro_batches": plan.num_micro_batches,
        "dataloader_num_workers": plan.dataloader_num_workers,
    }


def describe(row: dict[str, Any]) -> str:
    """One line of figures for people."""
    memory = f", {row['reserved_bytes'] / 2**30:.1f} GiB" if row["reserved_bytes"] else ""
    return (
        f"{row['tokens_per_s']:>10,.0f} tokens/s, {row['share_of_peak']:.2f} of peak, waiting {row['wait_share']:.3f}"
        f"{memory}, loss {row['last_loss']:.3f}{', ' + '; '.join(row['findings']) if row['findings'] else ''}"
    )
