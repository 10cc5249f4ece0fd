"""What a run goes on from: a fresh state or that of a checkpoint, whole or to be held in parts."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onecard.checkpoint import Checkpoint, read_checkpoint
from onecard.data import ChatCorpus, TrainingData
from onecard.distributed.meeting import meeting
from onecard.model.hub import find_cached
from onecard.model.weight_files import fingerprint
from onecard.spec import Plan
from onecard.training.assemble import assemble, assemble_hollow, initial_weights
from onecard.training.sharded import Shards
from onecard.training.snapshot import restore
from onecard.training.state import TrainState

log = logging.getLogger("onecard.run")


@dataclass
class Start:
    """A state and the checkpoint that it stands at, or will.

    Of a state in parts it is hollow until the ranks have come together: the weights of a new run are with the leader,
    those of a checkpoint in its files.
    """

    state: TrainState
    restored: Checkpoint | None
    is_hollow: bool
    weights: dict[str, Tensor] | None = None

    def share_out(self) -> None:
        """Gives each rank its part of a hollow state; all have to call it.

        Raises:
            CheckpointError: the checkpoint belongs to another model, or cannot be read.
        """
        if self.restored is not None:
            restore(self.state, self.restored)
        else:
            assert isinstance(self.state.spread, Shards)
            self.state.spread.fill(self.weights)
        self.weights = None


def load_start(plan: Plan, corpus: TrainingData, checkpoint: Path | None) -> Start:
    """Builds the state of a run and restores it, as far as a rank can by itself.

    Raises:
        InputError, CheckpointError: as `assemble_run`; the checkpoint is damaged or belongs to another model.
    """
    state = assemble_run(plan, corpus, checkpoint)
    restored = None if checkpoint is None else read_checkpoint(checkpoint)
    start = Start(state, restored, _is_in_parts(plan))
    if start.is_hollow:
        if restored is None and meeting().place.is_leader:
            start.weights = initial_weights(plan)
    elif restored is not None:
        restore(state, restored)
    return start


def assemble_run(plan: Plan, corpus: TrainingData | None, checkpoint: Path | None) -> TrainState:
    """Builds the state of a run, its device set up for it; a base that is gone comes from the checkpoint."""
    _set_up_device(plan)
    base = plan.model.base
    is_gone = base is not None and base.folder is not None and find_cached(base.folder) is None
    if base is not None and is_gone and checkpoint is not None and plan.adapt is None:
        log.warning("%s is not in %s any more: whether it has changed could not be compared", base.name, base.folder)
        own = {"folder": str(checkpoint), "fingerprint": fingerprint(checkpoint), "num_new_tokens": 0}
        model = plan.model.model_copy(update={"base": base.model_copy(update=own)})
        state = _assemble(plan.model_copy(update={"model": model}))
        state.plan = plan
    else:
        state = _assemble(plan)
    if isinstance(corpus, ChatCorpus):
        # So that a checkpoint ends its answers in whatever tool opens it.
        ends, pad_id = list(corpus.stop_ids), corpus.tokenizer.pad_token_id
        state.model.generation_config.eos_token_id = ends
        state.model.generation_config.pad_token_id = ends[0] if pad_id is None else pad_id
    return state


def _assemble(plan: Plan) -> TrainState:
    return assemble_hollow(plan) if _is_in_parts(plan) else assemble(plan)


def _is_in_parts(plan: Plan) -> bool:
    return plan.strategy == "fsdp" and meeting().place.num_ranks > 1


def _set_up_device(plan: Plan) -> None:
    if plan.device.startswith("cuda"):
        # Events and streams belong to the current device.
        torch.cuda.set_device(plan.device)
        if plan.memory_limit_bytes is not None:
            # What the plan was made for: a larger card imitates a smaller one, and Windows does not page to system RAM.
            total_bytes = torch.cuda.get_device_properties(plan.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, plan.memory_limit_bytes / total_bytes), plan.device)
    elif plan.num_threads is not None:
        # Sums depend on how many threads share them, so a run keeps their number wherever it is resumed.
        torch.set_num_threads(plan.num_threads)
    torch.use_deterministic_algorithms(plan.deterministic)
