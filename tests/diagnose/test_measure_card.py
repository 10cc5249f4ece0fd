"""Timing, tried on the CPU with tiny sizes; the way to a card's row, with a card that is not there."""

import dataclasses

import pytest
import torch

from onecard.diagnose import measure_card
from onecard.diagnose.measure_card import Effort, local_key, measure_present_card, measure_rates, time_copy, time_matmul
from onecard.errors import InputError
from onecard.hardware import Gpu, Machine
from onecard.hardware.card_row import find_row_problems

CPU = torch.device("cpu")
TINY = Effort(matrix_size=48, copy_bytes=1 << 16, num_launches=10, seconds=0.0)
MACHINE = Machine(
    gpus=(),
    gpu_problem=None,
    driver=None,
    num_cores=2,
    ram_bytes=1,
    free_ram_bytes=1,
    platform="linux",
    python="3.12",
    has_bf16_cpu=False,
    bf16_cpu_reason="",
)
GPU = Gpu(0, "NVIDIA A10G", 22 * 1024**3, 0, (8, 6), "580.1", "GPU-5A")


def test_all_rates_are_timed_and_announced() -> None:
    said: list[str] = []
    rates = measure_rates(CPU, TINY, True, said.append)
    assert set(rates) == {
        "fp32_flops",
        "tf32_flops",
        "flops_16bit",
        "fp16_flops",
        "bandwidth_bytes_per_s",
        "launch_s",
    }
    assert all(rate > 0 for rate in rates.values())
    assert len(said) == 6


def test_a_card_without_bf16_is_rated_by_its_fp16() -> None:
    rates = measure_rates(CPU, TINY, False, lambda what: None)
    assert rates["flops_16bit"] == rates["fp16_flops"]
    assert "tf32_flops" not in rates


def test_precision_is_set_for_the_timing_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[torch.dtype, str]] = []
    monkeypatch.setattr(
        measure_card,
        "time_matmul",
        lambda device, dtype, effort: used.append((dtype, torch.backends.cuda.matmul.fp32_precision)) or 1.0,
    )
    before = torch.backends.cuda.matmul.fp32_precision
    measure_rates(CPU, TINY, True, lambda what: None)
    assert used[:2] == [(torch.float32, "ieee"), (torch.float32, "tf32")]
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_rates_count_every_operation_and_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_card, "_seconds", lambda operation, device, seconds: operation() is None or 0.5)
    assert time_matmul(CPU, torch.float32, TINY) == 2 * 48**3 / 0.5
    assert time_copy(CPU, TINY) == 2 * (1 << 16) / 0.5  # read once, written once


def test_time_is_that_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(measure_card.time, "perf_counter", lambda: clock[0])
    runs, waits = [], []
    monkeypatch.setattr(measure_card, "synchronize", waits.append)

    def operation() -> None:
        runs.append(1)
        clock[0] += 5.0 if len(runs) == 1 else 0.002  # the first one compiles

    assert measure_card._seconds(operation, CPU, 0.1) == pytest.approx(0.002)
    assert len(runs) > 30
    assert len(waits) < len(runs)  # runs follow one another without waiting


def test_without_a_card_there_is_nothing_to_measure() -> None:
    with pytest.raises(InputError, match="no card to measure: no NVIDIA GPU found"):
        measure_present_card(MACHINE, lambda what: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_a_card_that_torch_cannot_use_is_named_with_the_reason() -> None:
    with pytest.raises(InputError, match="NVIDIA A10G is there, but"):
        measure_present_card(dataclasses.replace(MACHINE, gpus=(GPU,)), lambda what: None)


def test_a_driver_s_problem_is_passed_on() -> None:
    with pytest.raises(InputError, match="no card to measure: the driver sleeps"):
        measure_present_card(dataclasses.replace(MACHINE, gpu_problem="the driver sleeps"), lambda what: None)


class SmallCuda:
    """The part of `torch.cuda` that describes one card, which is PyTorch's second one."""

    multi_processor_count = 80
    L2_cache_size = 6 * 1024**2

    def __init__(self, uuid: str = "5a") -> None:
        self.uuid = uuid
        self.used = iter([1 * 1024**3, 3 * 1024**3])

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10G")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_86", "sm_90a", "compute_120"])
        monkeypatch.setattr(torch.cuda, "get_device_properties", self.properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 21 * 1024**3))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(1.5 * 1024**3))
        monkeypatch.setattr(measure_card, "_used_bytes", lambda gpu: next(self.used))
        monkeypatch.setattr(
            measure_card, "measure_rates", lambda *words: {"fp32_flops": 1.0, "bandwidth_bytes_per_s": 2.0}
        )

    def properties(self, device: object) -> object:
        return self if device in (1, torch.device("cuda", 1)) else SmallCuda("other")


def test_the_row_of_a_card_can_be_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    SmallCuda().install(monkeypatch)
    key, row = measure_present_card(dataclasses.replace(MACHINE, gpus=(GPU,)), lambda what: None)
    assert key == "local-a10g"
    assert find_row_problems(row, is_local=True) == []
    assert (row["memory_gib"], row["visible_gib"], row["num_sms"], row["l2_mib"]) == (22, 21, 80, 6)
    assert row["measured_context_gib"] == 0.5  # 3 GiB used, 1 before, 1.5 of the allocator


def test_memory_of_another_program_is_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SmallCuda()
    cuda.used = iter([1 * 1024**3, 9 * 1024**3])
    cuda.install(monkeypatch)
    _, row = measure_present_card(dataclasses.replace(MACHINE, gpus=(GPU,)), lambda what: None)
    assert "measured_context_gib" not in row


def test_a_card_that_the_build_has_no_code_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    SmallCuda().install(monkeypatch)
    volta = dataclasses.replace(GPU, compute_capability=(7, 0))
    with pytest.raises(InputError, match=r"compute capability 7\.0, and PyTorch .* is built for 7\.5, 8\.6, 9\.0"):
        measure_present_card(dataclasses.replace(MACHINE, gpus=(volta,)), lambda what: None)


def test_a_card_that_only_the_driver_shows_is_not_mistaken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    SmallCuda("6b").install(monkeypatch)
    with pytest.raises(InputError, match="none of the cards that the driver shows"):
        measure_present_card(dataclasses.replace(MACHINE, gpus=(GPU,)), lambda what: None)


def test_the_row_s_name_comes_from_the_driver_s() -> None:
    assert local_key("NVIDIA GeForce RTX 4060 Laptop GPU") == "local-rtx-4060-laptop"
    assert local_key("Tesla V100-SXM2-32GB") == "local-tesla-v100-sxm2-32gb"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_present_card_is_measured() -> None:
    from onecard.hardware import probe_machine

    _, row = measure_present_card(probe_machine(), lambda what: None)
    assert find_row_problems(row, is_local=True) == []
    assert row["flops_16bit"] > row["fp32_flops"] > 1e12
    assert row["bandwidth_bytes_per_s"] > 5e10
    assert 1e-7 < row["launch_s"] < 1e-4
