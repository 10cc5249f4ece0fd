"""Predicted times: single kernels by hand, whole steps by what must hold for any card."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.hardware import Card, find_card
from onecard.planner import trace as tracing
from onecard.planner.calibrate import Measured, calibrate
from onecard.planner.efficiency import Efficiencies, default_efficiencies, is_geforce
from onecard.planner.kernels import class_of, fill_share, time_kernel
from onecard.planner.recorder import Record, Recorder, Work
from onecard.planner.roofline import predict_time
from onecard.planner.trace import Trace, record_plan
from onecard.spec import Plan

MakePlan = Callable[..., Plan]

# Round figures: 100 TFLOP/s in 16 bits, 25 in fp32, 1 TB/s, 100 SMs.
EVEN = Efficiencies(0.8, 0.8, 0.5, kernel_s=0.0, dispatch_s=0.0, fused_dispatch_s=0.0)


@pytest.fixture
def card() -> Card:
    rates = {"flops_16bit": 100e12, "fp32_flops": 25e12, "tf32_flops": 50e12, "bandwidth_bytes_per_s": 1e12}
    return replace(find_card("RTX 3090"), num_sms=100, launch_s=None, **rates)


def product(rows: int, columns: int, depth: int, dtype: str = "bfloat16", calls: int = 1) -> Work:
    size = 4 if dtype == "float32" else 2
    num_bytes = calls * size * (rows * depth + depth * columns + rows * columns)
    return Work("mm", "forward", (rows, columns, depth), dtype, calls, 2 * calls * rows * columns * depth, num_bytes, 1)


def moved(name: str, gigabytes: float, phase: str = "forward", calls: int = 1, micro_batch: int = 1) -> Work:
    return Work(name, phase, (1,), "bfloat16", calls, 0, int(gigabytes * 1e9), micro_batch)


def trace_of(*work: Work, num_micro_batches: int = 1) -> Trace:
    return Trace(Record(work=list(work)), 0, 0, num_micro_batches)


def single_step(tiny_plan: MakePlan, **changes: object) -> Plan:
    return tiny_plan("gpt2", **{"micro_batch_size": 4, "total_batch_size": 4, "precision": "bf16"} | changes)


def test_a_product_that_fills_its_waves_takes_its_operations_by_the_rate(card: Card) -> None:
    # 100 tiles of 256 x 128 for 100 SMs: one full wave at the whole share of the peak.
    time = time_kernel(product(2560, 1280, 4096), card, EVEN, 1024)
    assert time.limit == "arithmetic"
    assert time.seconds == pytest.approx(2 * 2560 * 1280 * 4096 / (100e12 * 0.8))


def test_the_last_wave_takes_as_long_as_a_full_one() -> None:
    full = fill_share(256 * 10, 128 * 10, 256, 1, num_sms=100)
    # One row of tiles more: 110 tiles are two waves, of which cutting finer wins back a part only.
    spilled = fill_share(256 * 11, 128 * 10, 256, 1, num_sms=100)
    assert full == 1.0
    assert 0.5 < spilled < 0.85


def test_a_long_product_with_few_tiles_is_cut_along_its_depth() -> None:
    shallow, deep = (fill_share(768, 768, depth, 1, num_sms=108) for depth in (256, 8192))
    assert deep > 1.4 * shallow


def test_a_vocabulary_of_odd_size_slows_tensor_cores_and_only_those(card: Card) -> None:
    def ratio(dtype: str) -> float:
        odd, even = (time_kernel(product(8192, size, 768, dtype), card, EVEN, 1024) for size in (50257, 50304))
        return odd.seconds / even.seconds

    assert ratio("bfloat16") == pytest.approx(1 / EVEN.misaligned, rel=0.02)
    assert ratio("float32") == pytest.approx(1.0, rel=0.02)


def test_fp32_products_use_tf32_only_where_it_is_allowed(card: Card) -> None:
    work = product(2560, 1280, 4096, "float32")
    plain, fast = (time_kernel(work, card, replace(EVEN, uses_tf32=uses), 1024).seconds for uses in (False, True))
    assert plain / fast == pytest.approx((50 * 0.8) / (25 * 0.5))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gelu_backward", "pointwise"),
        ("native_layer_norm_backward", "reduction"),
        ("_log_softmax", "reduction"),
        ("_fused_adamw_", "optimizer"),
        ("embedding_dense_backward", "embedding"),
        ("cat", "copy"),
        ("triton_poi_fused_add_3", "fused"),
    ],
)
def test_what_moves_bytes_takes_them_by_the_bandwidth_of_its_kind(name: str, kind: str, card: Card) -> None:
    work = moved(name, 3.0)
    time = time_kernel(work, card, EVEN, 1024)
    assert class_of(work, EVEN) == kind
    assert time.limit == "bandwidth"
    assert time.seconds == pytest.approx(3e9 / (1e12 * getattr(EVEN, kind)))


def test_a_tiny_kernel_takes_the_least_time_of_one(card: Card) -> None:
    work = Work("add", "forward", (4,), "float32", 1000, 0, 48000)
    time = time_kernel(work, card, replace(EVEN, kernel_s=2e-6), 1024)
    assert (time.seconds, time.limit) == (pytest.approx(2e-3), "launches")


def test_flash_attention_skips_half_and_a_mask_skips_nothing(card: Card) -> None:
    flash, masked = (
        Work(f"_scaled_dot_product_{name}_attention", "forward", (8, 12, 4096, 64), "bfloat16", 1, int(1e12), 1)
        for name in ("flash", "efficient")
    )
    blocks = 4096 // 128
    computed = blocks * (blocks + 1) / 2 / blocks**2
    assert time_kernel(flash, card, EVEN, 4096).seconds == pytest.approx(computed * 0.01 / EVEN.flash_forward)
    assert time_kernel(masked, card, EVEN, 4096).seconds == pytest.approx(0.01 / EVEN.efficient_forward)


def test_many_micro_batches_are_the_first_and_as_many_like_the_second(card: Card, tiny_plan: MakePlan) -> None:
    both = [moved("add", 2.0, phase, 1, index) for phase in ("forward", "backward") for index in (1, 2)]
    only_first, only_later = moved("_to_copy", 3.0, "backward", 1, 1), moved("add_", 7.0, "backward", 1, 2)
    # The sum of the loss after each backward pass is noticed as update.
    after = [moved("add_", 1.0, "update", 1, index) for index in (1, 2)]
    update = moved("_fused_adamw_", 11.0, "update", 1, 2)
    trace = trace_of(*both, only_first, only_later, *after, update, num_micro_batches=2)
    plan = single_step(tiny_plan, total_batch_size=20)
    seconds = predict_time(trace, plan, card, EVEN).seconds
    assert seconds["pointwise"] == pytest.approx((5 * 4.0 + 4 * 7.0 + 5 * 1.0) / 1000 / EVEN.pointwise)
    assert seconds["copy"] == pytest.approx(0.003 / EVEN.copy)
    assert seconds["optimizer"] == pytest.approx(0.011 / EVEN.optimizer)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_five_recorded_whole_takes_what_two_tell(
    precision: str, card: Card, tiny_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = single_step(tiny_plan, total_batch_size=20, precision=precision)
    with FakeTensorMode():
        two = record_plan(plan)
        monkeypatch.setattr(tracing, "min", lambda *_: 5, raising=False)
        five = record_plan(plan)
    # What prepares the batches is scaled as a whole, some scalars too many.
    for trace in (two, five):
        trace.record.work = [work for work in trace.record.work if work.phase != "batch"]
    for work in five.record.work:
        # All are there: none stands for others.
        work.micro_batch = 0
    whole = predict_time(replace(five, num_micro_batches=1), plan, card)
    told = predict_time(two, plan, card)
    for kind, seconds in whole.seconds.items():
        assert told.seconds[kind] == pytest.approx(seconds, rel=1e-9), kind
    assert (told.step_s, two.num_micro_batches) == (pytest.approx(whole.step_s, rel=1e-9), 2)


def test_a_faster_card_is_never_predicted_slower(tiny_plan: MakePlan, card: Card) -> None:
    trace = trace_of(product(8192, 3072, 768, calls=24), moved("gelu", 4.0, calls=24))
    plan = single_step(tiny_plan)
    before = predict_time(trace, plan, card, EVEN).step_s
    for figure in ("flops_16bit", "bandwidth_bytes_per_s"):
        faster = replace(card, **{figure: 2 * getattr(card, figure)})
        assert predict_time(trace, plan, faster, EVEN).step_s < before
    order = ["RTX 3060 12GB", "RTX 3090", "RTX 4090", "H100 SXM"]
    steps = [predict_time(trace, plan, find_card(name)).step_s for name in order]
    assert steps == sorted(steps, reverse=True)


def test_a_starved_memory_becomes_the_limit_and_slow_python_another(tiny_plan: MakePlan, card: Card) -> None:
    trace = trace_of(product(8192, 3072, 3072, calls=24), moved("gelu", 10.0, calls=24))
    plan = single_step(tiny_plan)
    assert predict_time(trace, plan, card, EVEN).limited_by == "arithmetic"
    starved = replace(card, bandwidth_bytes_per_s=1e11)
    assert predict_time(trace, plan, starved, EVEN).limited_by == "bandwidth"
    held_up = predict_time(trace, plan, card, replace(EVEN, dispatch_s=0.01))
    assert (held_up.limited_by, held_up.step_s) == ("launches", pytest.approx(48 * 0.01))
    assert held_up.step_s == pytest.approx(sum(held_up.seconds.values()))
    assert predict_time(trace, plan.model_copy(update={"max_seq_length": 10**7}), card, EVEN).limited_by == "data"


def test_compiled_kernels_cost_python_less(tiny_plan: MakePlan, card: Card) -> None:
    efficiencies = replace(EVEN, dispatch_s=10e-6, fused_dispatch_s=4e-6)
    eager, compiled = (trace_of(moved(name, 0.0, calls=1000)) for name in ("gelu", "triton_fused_gelu"))
    plan = single_step(tiny_plan)
    assert predict_time(eager, plan, card, efficiencies).step_s == pytest.approx(0.01)
    assert predict_time(compiled, plan, card, efficiencies).step_s == pytest.approx(0.004)


def test_documents_that_run_apart_are_launched_one_by_one(tiny_plan: MakePlan, card: Card) -> None:
    efficiencies = replace(EVEN, dispatch_s=10e-6)
    trace = trace_of(*(moved("gelu", 0.0, phase, calls=1000) for phase in ("forward", "backward", "update")))
    plan = single_step(tiny_plan)
    apart = plan.model_copy(update={"attn_implementation": "apart"})
    assert predict_time(trace, plan, card, efficiencies).step_s == pytest.approx(0.03)
    # Four rows forward and back, one update.
    assert predict_time(trace, apart, card, efficiencies).step_s == pytest.approx(0.09)
    one_text = apart.corpus.model_copy(update={"num_train_documents": 1})
    for together in ({"corpus": one_text}, {"task": "sft"}):
        made = apart.model_copy(update=together)
        assert predict_time(trace, made, card, efficiencies).step_s == pytest.approx(0.03)


def test_the_band_of_a_laptop_spans_its_power_limits(tiny_plan: MakePlan) -> None:
    trace = trace_of(product(8192, 3072, 3072, calls=24), moved("gelu", 2.0, calls=24))
    plan = single_step(tiny_plan)
    laptop = find_card("RTX 4060 Laptop")
    desktop = replace(laptop, boost_clock_range_hz=None, bandwidth_range_bytes_per_s=None, power_limits_w=None)
    wide, narrow = (predict_time(trace, plan, each) for each in (laptop, desktop))
    assert wide.step_s == narrow.step_s
    assert wide.low_s < narrow.low_s < narrow.step_s < narrow.high_s < wide.high_s
    assert narrow.energy_wh is None
    assert wide.energy_wh is not None
    assert wide.energy_wh[0] < wide.energy_wh[1]
    # More power, less time: neither end of the one meets that of the other.
    low_w, high_w = laptop.power_limits_w
    run_s = [wide.total_s * bound_s / wide.step_s / 3600 for bound_s in (wide.low_s, wide.high_s)]
    assert wide.energy_wh[0] > 1.2 * low_w * run_s[0]
    assert wide.energy_wh[1] < 0.9 * high_w * run_s[1]


def test_the_slower_memory_of_some_laptops_is_in_the_band(tiny_plan: MakePlan) -> None:
    time = predict_time(trace_of(moved("gelu", 20.0)), single_step(tiny_plan), find_card("RTX 3060 Laptop"), EVEN)
    # 336 GB/s, or 288 in versions of 60 to 70 W.
    assert time.high_s / time.step_s == pytest.approx(336 / 288 * EVEN.high)


def test_a_run_is_its_steps_evaluations_and_checkpoints(tiny_plan: MakePlan, card: Card) -> None:
    trace = trace_of(moved("gelu", 850.0), moved("gelu", 85.0, "evaluation", 1, 0))
    trace.record.sizes, trace.record.labels = [2 * 10**9, 5], {0: "weights"}
    trace = replace(trace, record=replace(trace.record, order=[0, 1]), resident_end=2)
    plan = single_step(tiny_plan, eval_steps=8, save_steps=10, eval_batches=3)
    time = predict_time(trace, plan, replace(card, tdp_w=360.0), EVEN)
    # Of 100 held-out tokens, 64 to a batch. 20 steps: evaluations after 8, 16 and 20, checkpoints there and after 10.
    assert time.evaluation_s == pytest.approx(0.1 * 100 / 64)
    assert time.save_s == pytest.approx(4.0)
    assert time.total_s == pytest.approx(20 * 1.0 + 3 * time.evaluation_s + 4 * 4.0)
    assert time.tokens_per_s == pytest.approx(64.0)
    assert time.share_of_peak == pytest.approx(1e5 * 64 / 100e12)
    assert time.energy_wh == (pytest.approx(0.1 * 0.8 * time.total_s), pytest.approx(0.1 * 1.6 * time.total_s))


def test_cards_fall_into_the_families_their_efficiencies_were_read_for() -> None:
    consumer = ["RTX 2080 Ti", "RTX 3060 12GB", "RTX 3060 Laptop", "RTX 4090", "RTX 5060"]
    assert all(is_geforce(find_card(name)) for name in consumer)
    assert not any(is_geforce(find_card(name)) for name in ("T4", "A6000", "L4", "L40S", "A100 40GB", "H200"))
    assert default_efficiencies(find_card("T4")).gemm_fp32 < default_efficiencies(find_card("RTX 2080 Ti")).gemm_fp32


def test_a_card_measured_here_is_taken_at_its_word(card: Card) -> None:
    local = default_efficiencies(replace(card, is_local=True, launch_s=2.1e-6))
    shipped = default_efficiencies(card)
    assert local.gemm_16bit == local.gemm_fp32 == 1.0
    assert shipped.pointwise < local.pointwise <= 1.0
    assert local.dispatch_s == pytest.approx(shipped.dispatch_s / 2)


def test_calibration_finds_planted_efficiencies(card: Card, tiny_plan: MakePlan) -> None:
    planted = replace(EVEN, gemm_16bit=0.6, pointwise=0.7, reduction=0.45)
    plan = single_step(tiny_plan)
    runs = []
    for calls, gelu, norm in ((40, 1.0, 1.0), (10, 30.0, 2.0), (10, 2.0, 30.0), (20, 5.0, 5.0)):
        trace = trace_of(product(8192, 3072, 3072, calls=calls), moved("gelu", gelu), moved("native_layer_norm", norm))
        measured_s = predict_time(trace, plan, card, planted).step_s
        runs.append(Measured(measured_s, predict_time(trace, plan, card, EVEN).seconds))
    found = calibrate(EVEN, runs)
    for name in ("gemm_16bit", "pointwise", "reduction"):
        assert getattr(found, name) == pytest.approx(getattr(planted, name), rel=0.03)
    assert found.copy == EVEN.copy
    assert EVEN.low < found.low < 1 < found.high < EVEN.high


def test_one_run_moves_what_it_spends_its_time_on() -> None:
    found = calibrate(EVEN, [Measured(2.0, {"gemm_16bit": 0.9, "pointwise": 0.1})])
    moved_by = {name: getattr(EVEN, name) / getattr(found, name) for name in ("gemm_16bit", "pointwise")}
    assert 1.7 < moved_by["gemm_16bit"] < 2.3
    assert 1.0 < moved_by["pointwise"] < 1.2


def test_noise_does_not_move_what_takes_a_hundredth_of_a_step() -> None:
    # Six times slower norms would explain the second run, but so does chance.
    runs = [Measured(1.0, {"gemm_16bit": 1.0}), Measured(1.05, {"gemm_16bit": 0.99, "reduction": 0.01})]
    found = calibrate(EVEN, runs)
    assert found.reduction == pytest.approx(EVEN.reduction, rel=0.1)
    assert found.gemm_16bit == pytest.approx(EVEN.gemm_16bit, rel=0.05)


def test_runs_that_wait_for_python_tell_nothing_of_the_card() -> None:
    assert calibrate(EVEN, [Measured(2.0, {"gemm_16bit": 0.5, "launches": 1.5})]) == EVEN


def test_the_update_of_the_optimizer_is_counted(tiny_plan: MakePlan) -> None:
    # Fused and foreach operators give nothing back; they write into what they are handed.
    with FakeTensorMode():
        trace = record_plan(single_step(tiny_plan, optimizer="adamw", precision="fp32"))
    counted = sum(work.num_bytes for work in trace.record.work if work.name == "_fused_adamw_")
    weights = sum(trace.record.sizes[i] for i, label in trace.record.labels.items() if label == "weights")
    # Reads weights, gradients and two moments and writes all but the gradients, which its schema calls written too.
    assert 7 * weights <= counted <= 8.1 * weights


def test_products_in_place_are_counted() -> None:
    import torch

    recorder = Recorder()
    with FakeTensorMode():
        total, left, right = torch.zeros(8, 16), torch.zeros(8, 32), torch.zeros(32, 16)
        with recorder:
            total.addmm_(left, right)
    (work,) = recorder.record.work
    assert (work.flops, work.shape) == (2 * 8 * 16 * 32, (8, 16, 32))
