"""The trainer's own step on tensors without storage, recorded: what a plan would allocate and compute on a card."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.data import Batch
from onecard.model.attention import DocumentBorders
from onecard.model.decoder import Decoder
from onecard.model.target import traced_as
from onecard.planner.as_cuda import SCRATCH, as_cuda
from onecard.planner.aside import PHASES, evaluate, sample, save
from onecard.planner.compiled import compile_ahead, compiling_for_card
from onecard.planner.recorder import ON_HOST, Record, Recorder
from onecard.spec import Plan
from onecard.training.assemble import assemble
from onecard.training.state import TrainState
from onecard.training.step import place, train_step

# An operation that does not run without values is told of in words; PyTorch would print its own traceback of it, too.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Trace:
    """A record in three parts: `order[:resident_end]` stays for the whole run, then a step, then what runs once.

    The step has at most two micro-batches: the first, and one that adds to gradients that are there.
    """

    record: Record
    resident_end: int
    step_end: int
    num_micro_batches: int


def trace_plan(plan: Plan, compute_capability: tuple[int, int] | None, *, has_borders: bool = True) -> Trace:
    """Traces one update and what else a run does as a card of this capability, or a CPU, would run them.

    `has_borders`: whether documents end inside the rows of a batch, which asks for other attention kernels.
    Takes seconds and no memory to speak of; for a compiled plan, about as long as the compiler.

    Raises:
        CannotTraceCompiled: the plan is compiled and this PyTorch's compiler fails or is unknown.
    """
    if compute_capability is None:
        with FakeTensorMode():
            return record_plan(plan, has_borders=has_borders)
    recorder = Recorder(SCRATCH)
    compiler: AbstractContextManager[None] = nullcontext()
    if plan.torch_compile:
        compiler = compiling_for_card(recorder.count_kernel)
    with FakeTensorMode(), traced_as("cuda"), as_cuda(compute_capability), compiler:
        return record_plan(plan, has_borders=has_borders, recorder=recorder)


def record_plan(plan: Plan, *, has_borders: bool = True, recorder: Recorder | None = None) -> Trace:
    """Records one update and what else a run does on the CPU, with real tensors or under a mode that fakes them."""
    num_micro_batches = min(2, plan.num_micro_batches)
    state = assemble(plan.model_copy(update={"device": "cpu"}), with_weights=False)
    program = Program(
        _resident_tensors(state),
        lambda recorder: _step(recorder, state, num_micro_batches, has_borders),
        lambda recorder: _do_aside(recorder, state, has_borders),
    )
    recorder = recorder or Recorder()
    _label_gradients(recorder, state)
    state.decoder = _AnnouncedDecoder(state, recorder)
    if plan.torch_compile:
        batch = place(_batch(plan, plan.micro_batch_size, has_borders), state)
        compile_ahead(state.decoder, batch.ids, batch.borders)
        recorder.micro_batch = 0
    return record_program(program, num_micro_batches=num_micro_batches, recorder=recorder)


@dataclass(frozen=True)
class Program:
    """Anything that can be recorded: tensors that are there, by kind, a step that is repeated, and what runs once.

    A step leaves behind what it found, so that its record can be played again and again. A program whose iterations
    hold on to things of earlier ones has no such step: all of it belongs into `once`.
    """

    resident: dict[str, list[Tensor]]
    step: Callable[[Recorder], None] | None
    once: Callable[[Recorder], None]


def record_program(program: Program, *, num_micro_batches: int = 1, recorder: Recorder | None = None) -> Trace:
    """Records a program on the CPU, with real tensors or under a mode that fakes them."""
    recorder = recorder or Recorder()
    for label, tensors in program.resident.items():
        for tensor in tensors:
            recorder.adopt(tensor, label)
    resident_end = len(recorder.record.order)
    with recorder:
        if program.step is not None:
            program.step(recorder)
        step_end = len(recorder.record.order)
        program.once(recorder)
    return Trace(recorder.record, resident_end, step_end, num_micro_batches)


def _resident_tensors(state: TrainState) -> dict[str, list[Tensor]]:
    """What lies on the card before the first step, in the order in which `assemble` puts it there."""
    optimizer = state.optimizer
    return {
        "weights": [*state.model.parameters(), *state.model.buffers(), *optimizer.masters.values()],
        ON_HOST: optimizer.paged_tensors(),
        "optimizer": [
            *optimizer.state_tensors().values(),
            *optimizer.constant_tensors(),
            state.loss_scale.value,
        ],
    }


class _AnnouncedDecoder(Decoder):
    """Tells a recorder when the decoder runs."""

    def __init__(self, state: TrainState, recorder: Recorder) -> None:
        super().__init__(state.model, compiled=state.plan.torch_compile)
        self._recorder = recorder

    def __call__(self, ids_BT: Tensor, borders: DocumentBorders | None) -> Tensor:
        self._recorder.phase = "forward"
        self._recorder.micro_batch += 1
        hidden_ND = super().__call__(ids_BT, borders)
        self._recorder.phase = "loss"
        return hidden_ND


def _label_gradients(recorder: Recorder, state: TrainState) -> None:
    for name, master in state.optimizer.masters.items():
        parameter = state.model.get_parameter(name)

        def label(_: Tensor, master: Tensor = master) -> None:
            if master.grad is not None:
                recorder.label(master.grad, "gradients")

        # Runs after the optimizer's own hook, which moves the gradient to the master.
        parameter.register_post_accumulate_grad_hook(label)


def _step(recorder: Recorder, state: TrainState, num_micro_batches: int, has_borders: bool) -> None:
    plan = state.plan
    recorder.phase = "batch"
    batches = [place(_batch(plan, plan.micro_batch_size, has_borders), state) for _ in range(num_micro_batches)]
    train_step(state, batches, plan.optimizer.learning_rate, max_grad_norm=plan.optimizer.max_grad_norm)


def _do_aside(recorder: Recorder, state: TrainState, has_borders: bool) -> None:
    # Held-out chats are never packed.
    has_heldout_borders = has_borders and state.plan.task == "pretrain"
    runs = (
        lambda: evaluate(recorder, state, _batch(state.plan, state.plan.eval_batch_size, has_heldout_borders)),
        lambda: sample(recorder, state),
        lambda: save(recorder, state),
    )
    for phase, run in zip(PHASES, runs, strict=True):
        try:
            run()
        # Whatever a family's own code asks of its cache: a step that can be traced is reason enough to plan.
        except Exception as error:
            state.model.train()
            recorder.omit(phase, " ".join(str(error).split())[:200] or type(error).__name__)


def _batch(plan: Plan, rows: int, has_borders: bool) -> Batch:
    shape = (rows, plan.max_seq_length)
    ids, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    documents = torch.zeros(shape, dtype=torch.int32) if has_borders else None
    # Of chats nearly all tokens count: where all did, none would have to be picked out.
    num_targets = ids.numel() - (plan.task == "sft")
    return Batch(ids, targets, documents, num_targets)
