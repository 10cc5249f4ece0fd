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

from onecard.data import Batch
from onecard.distributed.meeting import meeting
from onecard.run.probe import probe_worst_case
from onecard.run.stepping import make_step
from onecard.spec import Plan
from onecard.training.assemble import assemble, assemble_hollow, initial_weights
from onecard.training.spread import own_share, spread
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


def train(plan: Plan, num_micro_batches: int) -> dict[str, Any]:
    """Makes updates and gives what they were like, with a sum over all weights at the end."""
    ranks = meeting().begin(torch.device("cpu"), 900.0)
    is_hollow = plan.strategy == "fsdp" and ranks.is_several
    state = assemble_hollow(plan) if is_hollow else assemble(plan)
    spread(state, ranks)
    if is_hollow:
        state.spread.fill(initial_weights(plan) if ranks.is_leader else None)
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
    return found | {"type_of_head": str(state.head.weight_VD.dtype)}


def main() -> None:
    faulthandler.dump_traceback_later(float(os.environ["ENDS_AFTER_S"]), exit=True)
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {name: train(Plan.model_validate(case["plan"]), case["num_micro_batches"]) for name, case in cases.items()}
    everyone = meeting().begin(torch.device("cpu"), 900.0).gather_texts(json.dumps(found))
    if meeting().place.is_leader:
        Path(sys.argv[2]).write_text(json.dumps([json.loads(text) for text in everyone]), encoding="utf-8")


if __name__ == "__main__":
    main()
