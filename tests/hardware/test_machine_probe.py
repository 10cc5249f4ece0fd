"""The probe, with an NVML of a few lines and files as a kernel writes them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from onecard.hardware import Gpu, probe_machine
from onecard.hardware.nvidia import probe_gpus
from onecard.hardware.probe import cpu_quota, find_cpu_bf16, find_platform, memory_limit

GIB = 1024**3


class SmallNvml:
    """The part of `pynvml` that the probe uses. `broken` names functions that fail."""

    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_DRIVER_NOT_LOADED = 9

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(f"NVML error {value}")
            self.value = value

    def __init__(self, init_error: int | None = None, broken: tuple[str, ...] = (), num_cards: int = 2) -> None:
        self.init_error = init_error
        self.broken = broken
        self.num_cards = num_cards
        self.is_open = False

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.NVMLError(self.init_error)
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65"

    def nvmlDeviceGetCount(self) -> int:
        self._fail_if_broken("count")
        return self.num_cards

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self._fail_if_broken(f"card {index}")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=8 * GIB, free=(7 - handle) * GIB, used=GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (12, 0) if handle == 0 else (7, 5)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return ("NVIDIA GeForce RTX 5060", "NVIDIA GeForce GTX 1660")[handle]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return ("GPU-aaaa-1", "GPU-bbbb-2")[handle]

    def _fail_if_broken(self, name: str) -> None:
        if name in self.broken:
            raise self.NVMLError(999)


def test_cards_are_read_and_the_library_is_closed() -> None:
    nvml = SmallNvml()
    gpus, driver, problem = probe_gpus(nvml, {})
    assert gpus[0] == Gpu(0, "NVIDIA GeForce RTX 5060", 8 * GIB, 7 * GIB, (12, 0), "580.65", "GPU-aaaa-1")
    assert (len(gpus), driver, problem, nvml.is_open) == (2, "580.65", None, False)
    assert [gpu.supports_bf16 for gpu in gpus] == [True, False]


@pytest.mark.parametrize("error", [SmallNvml.NVML_ERROR_LIBRARY_NOT_FOUND, SmallNvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_no_driver_is_no_problem(error: int) -> None:
    assert probe_gpus(SmallNvml(init_error=error), {}) == ((), None, None)


def test_a_driver_that_does_not_answer_is_a_problem() -> None:
    assert probe_gpus(SmallNvml(init_error=18), {}) == ((), None, "the NVIDIA driver does not answer: NVML error 18")


def test_a_list_that_cannot_be_read_is_a_problem() -> None:
    nvml = SmallNvml(broken=("count",))
    assert probe_gpus(nvml, {}) == ((), None, "the NVIDIA driver cannot list its cards: NVML error 999")
    assert not nvml.is_open


def test_a_lost_card_does_not_hide_the_others() -> None:
    gpus, _, problem = probe_gpus(SmallNvml(broken=("card 0",)), {})
    assert [gpu.index for gpu in gpus] == [1]
    assert problem == "GPU 0 cannot be read: NVML error 999"


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        ("0", [0]),
        ("1,0", [1, 0]),
        (" 1 ", [1]),
        ("GPU-bbbb", [1]),
        ("0,7,1", [0]),
        ("0,0", [0]),
        ("", []),
        ("-1", []),
    ],
)
def test_hidden_cards_stay_hidden(variable: str, indices: list[int]) -> None:
    gpus, _, problem = probe_gpus(SmallNvml(), {"CUDA_VISIBLE_DEVICES": variable})
    assert ([gpu.index for gpu in gpus], problem) == (indices, None)


def test_a_selection_without_a_card_is_a_problem() -> None:
    gpus, _, problem = probe_gpus(SmallNvml(), {"CUDA_VISIBLE_DEVICES": "MIG-1"})
    assert (gpus, problem) == ((), "CUDA_VISIBLE_DEVICES is 'MIG-1', which names none of the 2 cards here")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
    ],
)
def test_a_containers_share_of_the_cpu(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("files", "limit_and_use"),
    [
        (
            {"memory.max": "1000\n", "memory.current": "600\n", "memory.stat": "anon 100\ninactive_file 200\n"},
            (1000, 400),
        ),
        ({"memory.max": "1000\n", "memory.current": "600\n"}, (1000, 600)),
        (
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "600\n",
                "memory/memory.stat": "total_inactive_file 50\n",
            },
            (1000, 550),
        ),
    ],
)
def test_a_containers_memory(tmp_path: Path, files: dict[str, str], limit_and_use: tuple[int, int]) -> None:
    assert memory_limit(write(tmp_path, files)) == limit_and_use


@pytest.mark.parametrize("files", [{}, {"memory.max": "max\n", "memory.current": "5\n"}])
def test_no_limit_is_more_than_any_machine_has(tmp_path: Path, files: dict[str, str]) -> None:
    limit, used = memory_limit(write(tmp_path, files))
    assert (limit > 2**50, used) == (True, 0)


@pytest.mark.parametrize(
    ("system", "kernel", "platform"),
    [
        ("linux", "Linux version 6.8.0 (gcc)", "linux"),
        ("linux", "Linux version 5.15.90.1-microsoft-standard-WSL2", "wsl"),
        ("win32", "", "windows"),
        ("darwin", "", "macos"),
    ],
)
def test_platforms(tmp_path: Path, system: str, kernel: str, platform: str) -> None:
    assert find_platform(system, write(tmp_path, {"version": kernel})) == platform


@pytest.mark.parametrize(
    ("files", "has_bf16", "reason"),
    [
        ({"cpuinfo": "flags : fpu avx512_bf16 amx_bf16\n"}, True, "amx_bf16"),
        ({"cpuinfo": "flags : fpu avx512_bf16\n"}, True, "avx512_bf16"),
        ({"cpuinfo": "flags : fpu avx2\n"}, False, "neither"),
        ({}, False, "unknown on this system (arm64)"),
    ],
)
def test_bf16_on_a_cpu(tmp_path: Path, files: dict[str, str], has_bf16: bool, reason: str) -> None:
    found, why = find_cpu_bf16(write(tmp_path, files), "arm64")
    assert found is has_bf16
    assert reason in why


def test_this_machine_can_be_described() -> None:
    machine = probe_machine()
    assert machine.num_cores >= 1
    assert 0 < machine.free_ram_bytes <= machine.ram_bytes
    assert machine.platform in ("linux", "windows", "wsl", "macos")
