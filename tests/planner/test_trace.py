"""A trace without storage allocates what a real step does, and what a card's kernels would."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.planner.recorder import Recorder
from onecard.planner.replay import replay
from onecard.planner.trace import Program, record_plan, record_program
from onecard.spec import AdaptPlan, Plan


@pytest.mark.parametrize("has_borders", [True, False], ids=["borders", "plain"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "optimizer"), [("qwen3", "muon"), ("llama", "adamw"), ("gpt2", "adamw")])
def test_fake_and_real_steps_allocate_the_same_bytes_in_the_same_order(
    name: str,
    optimizer: str,
    precision: str,
    gradient_checkpointing: bool,
    has_borders: bool,
    tiny_plan: Callable[..., Plan],
) -> None:
    plan = tiny_plan(
        name,
        optimizer=optimizer,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        dropout=0.1,
        micro_batch_size=2,
        total_batch_size=5,
    )
    check_equal(plan, has_borders)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_fake_and_a_real_step_that_recomputes_half_allocate_the_same_bytes(
    name: str, tiny_plan: Callable[..., Plan]
) -> None:
    plan = tiny_plan(name, precision="bf16", gradient_checkpointing=0.5, dropout=0.1, total_batch_size=5)
    check_equal(plan, has_borders=True)


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("name", "method", "precision"), [("qwen3", "qlora", "bf16"), ("llama", "lora", "fp32"), ("gpt2", "qlora", "bf16")]
)
def test_fake_and_real_adapters_allocate_the_same_bytes_in_the_same_order(
    name: str, method: str, precision: str, gradient_checkpointing: bool, tiny_plan: Callable[..., Plan]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plan = tiny_plan(
        name,
        optimizer="adamw",
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        micro_batch_size=2,
        total_batch_size=5,
        adapt=AdaptPlan(method=method, r=4, lora_dropout=0.1),
    )
    check_equal(plan, has_borders=True)


def test_a_step_of_chats_picks_out_its_targets_and_evaluates_without_borders(tiny_plan: Callable[..., Plan]) -> None:
    corpus = tiny_plan().corpus.model_copy(update={"num_train_rows": 100})
    chats = {"task": "sft", "packing": "rows", "corpus": corpus}
    with FakeTensorMode():
        text, chat = (record_plan(tiny_plan(micro_batch_size=2, **changes)) for changes in ({}, chats))
    picked = {(work.phase, work.name) for work in chat.record.work} - {
        (work.phase, work.name) for work in text.record.work
    }
    assert ("loss", "index_select") in picked
    assert ("evaluation", "index_select") in picked
    of_masks = [
        {work.name for work in trace.record.work if work.phase == "evaluation"} & {"masked_fill_", "tril"}
        for trace in (text, chat)
    ]
    assert of_masks[0]
    assert not of_masks[1]


@pytest.mark.parametrize("phase", ["evaluation", "sampling", "saving"])
@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode], ids=["real", "fake"])
def test_a_phase_that_cannot_be_traced_is_left_out_whole_and_named(
    phase: str, mode: Any, tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan("llama", sample_prompts=("a",))
    with mode():
        whole = record_plan(plan)

    def fail(recorder: Recorder, state: Any, *_: Any) -> None:
        recorder.phase = phase
        state.model.eval()
        kept = torch.zeros(1000) + 1
        raise RuntimeError(f"a value of {len(kept)}\nwas asked for")

    name = {"evaluation": "evaluate", "sampling": "sample", "saving": "save"}[phase]
    monkeypatch.setattr(f"onecard.planner.trace.{name}", fail)
    with mode():
        part = record_plan(plan)
    assert not whole.record.notes
    assert part.record.notes == [
        f"{phase} could not be traced (a value of 1000 was asked for), so what it takes is not in these figures"
    ]
    phases = [set(replay(trace, 0).phase_bytes) for trace in (whole, part)]
    assert phases[0] - phases[1] == {phase}
    assert phase not in {work.phase for work in part.record.work}
    assert replay(whole, 0).phase_bytes["backward"] == replay(part, 0).phase_bytes["backward"]


def test_frozen_weights_are_counted_once_and_as_they_rest(tiny_plan: Callable[..., Plan]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    adapt = AdaptPlan(method="qlora", r=4)
    plan = tiny_plan("llama", optimizer="adamw", precision="bf16", adapt=adapt)
    record = record_plan(plan).record
    weights = sum(record.sizes[number] for number, label in record.labels.items() if label == "weights")

    vectors, rotary, embedding = 5 * 32, 2 * 4, 97 * 32  # norms; frequencies and their copy; head untied
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)] * 2
    packed = sum(rows * columns // 2 for rows, columns in shapes)
    scales = sum(-(-rows * columns // 64) + 4 for rows, columns in shapes)  # 8 bits each, one fp32 for 256 of them
    constants = len(shapes) * (256 * 4 + 4)  # codebook and offset of each layer
    adapters = sum(4 * (rows + columns) for rows, columns in shapes) * (2 + 4)  # bf16 and fp32 master
    assert weights == 2 * (vectors + 2 * embedding) + 4 * rotary + packed + scales + constants + adapters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fake_and_a_real_step_on_one_row_allocate_the_same_bytes(
    precision: str, tiny_plan: Callable[..., Plan]
) -> None:
    plan = tiny_plan("llama", precision=precision, micro_batch_size=1, total_batch_size=2)
    check_equal(plan, has_borders=True)


# Matrices that are worth 8 bits, of which some are paged.
_WIDE = {"hidden_size": 64, "intermediate_size": 1600}


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw"])
@pytest.mark.parametrize(("name", "precision"), [("llama", "bf16"), ("qwen3", "fp32")])
def test_fake_and_real_8_bit_updates_allocate_the_same_bytes_in_the_same_order(
    name: str,
    precision: str,
    optimizer: str,
    tiny_plan: Callable[..., Plan],
    settings_of: Callable[..., dict[str, Any]],
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plan = tiny_plan(settings=settings_of(name, **_WIDE), optimizer=optimizer, precision=precision)
    check_equal(plan, has_borders=True)


def test_paged_state_lies_on_the_host_and_nowhere_else(
    tiny_plan: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    records, peaks = {}, {}
    for optimizer in ("adamw", "paged_adamw", "adamw_8bit", "paged_adamw_8bit"):
        trace = record_plan(tiny_plan(settings=settings_of("llama", **_WIDE), optimizer=optimizer))
        records[optimizer], peaks[optimizer] = trace.record, replay(trace, workspace_bytes=0)
    state = {name: peak.parts["optimizer"] for name, peak in peaks.items()}
    on_host = {name: record.host_bytes for name, record in records.items()}
    # Of each of two layers three matrices of 64 x 1600 are large enough to be paged one by one; in 8 bits all are one.
    in_layers, attention = 2 * 3 * 64 * 1600, 2 * 2 * 64 * 64
    assert on_host == {
        "adamw": 0,
        "paged_adamw": 8 * in_layers,
        "adamw_8bit": 0,
        "paged_adamw_8bit": 2 * (in_layers + attention + 97 * 64 + 192),
    }
    for name in ("adamw", "adamw_8bit"):
        assert state[name] == state[f"paged_{name}"] + on_host[f"paged_{name}"]
        fullest, without = (max(peaks[key].phase_bytes.values()) for key in (name, f"paged_{name}"))
        assert fullest == without + on_host[f"paged_{name}"]


def check_equal(plan: Plan, has_borders: bool) -> None:
    plan = plan.model_copy(update={"sample_prompts": ("a", "bc"), "sample_max_new_tokens": 5})
    real = record_plan(plan, has_borders=has_borders)
    with FakeTensorMode():
        fake = record_plan(plan, has_borders=has_borders)
    for name in ("sizes", "phases", "order", "labels"):
        assert getattr(fake.record, name) == getattr(real.record, name)
    # A single token times an adapter is one product or a batch of them, by strides that fakes have otherwise.
    real_work, fake_work = ([w for w in one.record.work if w.phase != "sampling"] for one in (real, fake))
    assert fake_work == real_work
    assert (fake.resident_end, fake.step_end) == (real.resident_end, real.step_end)


def test_a_program_whose_iterations_overlap_is_played_once() -> None:
    weights = torch.zeros(1024, 1024)

    def run(_: Recorder) -> None:
        kept = weights + 1
        for _ in range(3):
            kept = kept + 1

    trace = record_program(Program({"weights": [weights]}, None, run))
    # The weights, what an iteration begins with and what it makes.
    assert replay(trace, workspace_bytes=0).allocated_bytes == 3 * weights.nbytes
    assert trace.resident_end == trace.step_end == 1


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_samples_and_checkpoints_are_phases_of_their_own(name: str, tiny_plan: Callable[..., Plan]) -> None:
    """Samples hold the cache of all their tokens, so they grow with these; a checkpoint copies next to nothing."""
    peaks = []
    for num_new in (4, 12):
        plan = tiny_plan(name, sample_prompts=("ab", "abc"), sample_max_new_tokens=num_new)
        with FakeTensorMode():
            trace = record_plan(plan)
        phase_bytes = replay(trace, workspace_bytes=0).phase_bytes
        assert phase_bytes["resident"] < phase_bytes["sampling"] < phase_bytes["backward"]
        assert phase_bytes["resident"] <= phase_bytes["saving"] <= phase_bytes["resident"] + 8
        peaks.append(phase_bytes["sampling"])
    assert peaks[0] < peaks[1]


def test_a_run_without_prompts_has_no_samples(tiny_plan: Callable[..., Plan]) -> None:
    with FakeTensorMode():
        trace = record_plan(tiny_plan(sample_prompts=()))
    assert "sampling" not in replay(trace, workspace_bytes=0).phase_bytes


def test_an_operation_that_does_not_run_without_values_is_not_told_of_by_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # As `_grouped_mm` of the layers of experts in fp32, which is not in every PyTorch.
    with FakeTensorMode(), pytest.raises(RuntimeError):
        torch.mm(torch.empty(2, 3), torch.empty(2, 3))
    assert not caplog.records
