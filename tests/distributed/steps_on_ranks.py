"""A rank of the tests of the step: makes some updates of tiny models with its share of their micro-batches.

python steps_on_ranks.py PLANS.json OUT.json      with the environment that torchrun would give
"""

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from onecard.checkpoint import read_checkpoint, write_checkpoint
from onecard.data import Batch
from onecard.distributed.meeting import meeting
from onecard.distributed.ranks import Ranks
from onecard.run.probe import probe_worst_case
from onecard.run.stepping import make_step
from onecard.spec import Plan
from onecard.training.assemble import assemble, assemble_hollow, initial_weights
from onecard.training.snapshot import restore, snapshot
from onecard.training.spread import own_share, spread
from onecard.training.state import TrainState
from onecard.training.step import place

NUM_STEPS, NUM_MICRO_BATCHES, LENGTH, VOCABULARY = 4, 8, 16, 97


def batches_of(step: int, num_micro_batches: int) -> list[Batch]:
    """The micro-batches of a step: rows of unequal numbers of targets, some batches shorter than others."""
    found = []
    for number in range(num_micro_batches):
        tokens = LENGTH - 4 * (number % 3)
        generator = torch.Generator().manual_seed(100 * step + number)
        ids = torch.randint(1, VOCABULARY, (2, tokens + 1), generator=generator)
        targets = ids[:, 1:].clone()
        targets[:, : number % 5] = -100
        found.append(Batch(ids[:, :-1].contiguous(), targets, None, int((targets != -100).sum())))
    return found


def peak_bytes() -> int:
    """The most memory this process has held, on Linux; what the system tells of others begins with their parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def begin(plan: Plan, ranks: Ranks) -> TrainState:
    """A state at its start, which the ranks share, in parts where the plan says so."""
    if plan.strategy == "ddp" or not ranks.is_several:
        state = assemble(plan)
        spread(state, ranks)
        return state
    state = assemble_hollow(plan)
    spread(state, ranks)
    state.spread.fill(initial_weights(plan) if ranks.is_leader else None)
    return state


class NoTokenizer:
    """Stands where a run has one; of it no rank reads anything here."""

    def save_pretrained(self, folder: Path) -> None:
        pass


def read_again(state: TrainState, whole: dict[str, dict[str, torch.Tensor]], folder: Path) -> bool:
    """Whether a checkpoint of these parts, read by each rank for itself, is the whole again, bit for bit."""
    if state.ranks.is_leader:
        write_checkpoint(folder, snapshot(state, NoTokenizer(), {}, whole=whole))
    state.ranks.hear_leader()
    other = assemble_hollow(state.plan)
    spread(other, state.ranks)
    restore(other, read_checkpoint(folder))
    found = other.gather()
    return other.progress == state.progress and all(
        found[kind].keys() == tensors.keys() and all(torch.equal(found[kind][name], tensors[name]) for name in tensors)
        for kind, tensors in whole.items()
    )


def train(plan: Plan, num_micro_batches: int, folder: Path) -> dict[str, Any]:
    """Makes updates and gives what they were like, with a sum over all weights at the end."""
    ranks, before = meeting().begin(torch.device("cpu"), 900.0), peak_bytes()
    state = begin(plan, ranks)
    grown_bytes = peak_bytes() - before
    if state.is_in_parts:
        probe_worst_case(state)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        own = own_share(state, batches_of(step, num_micro_batches))
        stats = make_step(state, [place(batch, state) for batch in own], 1e-2)
        state.progress.step += 1
        losses.append(float(stats.loss))
        norms.append(float(stats.gradient_norm))
    whole = state.gather() or {"masters": state.optimizer.masters}  # in parts, of the leader alone
    weights = [float(master.detach().double().abs().sum()) for master in whole["masters"].values()]
    found = {"losses": losses, "norms": norms, "weights": weights, "num_targets": int(stats.num_targets)}
    if state.is_in_parts:
        found |= {"is_read_again": read_again(state, whole, folder), "grown_bytes": grown_bytes}
    return found | {"type_of_head": str(state.head.weight_VD.dtype)}


def main() -> None:
    faulthandler.dump_traceback_later(float(os.environ["ENDS_AFTER_S"]), exit=True)
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folders = Path(sys.argv[2]).with_suffix("")
    folders.mkdir(exist_ok=True)
    found = {
        name: train(Plan.model_validate(case["plan"]), case["num_micro_batches"], folders / f"{number}")
        for number, (name, case) in enumerate(cases.items())
    }
    everyone = meeting().begin(torch.device("cpu"), 900.0).gather_texts(json.dumps(found))
    if meeting().place.is_leader:
        Path(sys.argv[2]).write_text(json.dumps([json.loads(text) for text in everyone]), encoding="utf-8")


if __name__ == "__main__":
    main()
