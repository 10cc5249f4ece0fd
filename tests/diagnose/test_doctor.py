"""The doctor tells every test's outcome, also of tests that hang or end their process, and says what to do."""

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard.diagnose import arithmetic, host
from onecard.diagnose.card_state import check_memory, check_power, check_spill, check_temperature
from onecard.diagnose.doctor import examine
from onecard.diagnose.driver import check_build, check_choice, check_driver, fitting_build
from onecard.diagnose.machine_tests import TESTS, Entry
from onecard.diagnose.network import check_hub
from onecard.hardware import Gpu, Machine
from onecard.units import GIB

_WORKER = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(7)
    print(json.dumps({"name": name, "verdict": "good", "found": "fine", "remedy": ""}), flush=True)
"""


@pytest.fixture
def machine() -> Callable[..., Machine]:
    """A machine with one RTX 4060 Laptop, or other cards: `machine(("NVIDIA GeForce GTX 1080 Ti", (6, 1)))`."""

    def make(*cards: tuple[str, tuple[int, int]], driver: str | None = "580.65", **changes: Any) -> Machine:
        gpus = tuple(
            Gpu(index, name, (11 if "1080" in name else 8) * GIB, 7 * GIB, capability, driver or "", f"GPU-{index}")
            for index, (name, capability) in enumerate(cards)
        )
        values: dict[str, Any] = {
            "gpus": gpus,
            "gpu_problem": None,
            "driver": driver,
            "num_cores": 4,
            "ram_bytes": 16 * GIB,
            "free_ram_bytes": 12 * GIB,
            "platform": "linux",
            "python": "3.12",
            "has_bf16_cpu": False,
            "bf16_cpu_reason": "",
        }
        return Machine(**values | changes)

    return make


LAPTOP = ("NVIDIA GeForce RTX 4060 Laptop GPU", (8, 9))
PASCAL = ("NVIDIA GeForce GTX 1080 Ti", (6, 1))
BLACKWELL = ("NVIDIA GeForce RTX 5060", (12, 0))


def test_silence_on_a_crowded_machine_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.getloadavg", lambda: (1000.0, 0.0, 0.0))
    script = tmp_path / "worker.py"
    script.write_text(_WORKER, encoding="utf-8")
    tests = {"hangs": Entry(TESTS["cores"].run, 0.5, "install the driver")}
    _, found = examine("utf-8", tests, (sys.executable, str(script)))
    assert found.verdict == "warning"
    assert "wait for each core" in found.found
    assert "driver" not in found.remedy


def test_a_test_that_hangs_or_dies_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.getloadavg", lambda: (0.0, 0.0, 0.0))
    script = tmp_path / "worker.py"
    script.write_text(_WORKER, encoding="utf-8")
    limits = {"first": 30.0, "hangs": 0.5, "second": 30.0, "dies": 30.0, "third": 30.0}
    tests = {name: Entry(TESTS["cores"].run, limit_s, f"mend {name}") for name, limit_s in limits.items()}
    console, *found = examine("utf-8", tests, (sys.executable, str(script)))
    assert console.verdict == "good"
    assert [(check.name, check.verdict) for check in found] == [
        ("first", "good"),
        ("hangs", "bad"),
        ("second", "good"),
        ("dies", "bad"),
        ("third", "good"),
    ]
    assert "no answer after" in found[1].found
    assert "exit code 7" in found[3].found
    assert "out of luck" in found[3].found
    assert (found[1].remedy, found[3].remedy) == ("mend hangs", "mend dies")
    # What does not touch the card is not mended by a driver.
    assert all("driver" not in TESTS[name].remedy for name in TESTS if "disk" in name or "Hub" in name)


def test_the_worker_tells_real_tests_and_survives_what_they_raise() -> None:
    tests = {name: TESTS[name] for name in ("cores", "memory")} | {"no such test": Entry(TESTS["cores"].run, 30)}
    _, cores, memory, broken = examine("utf-8", tests)
    assert (cores.name, memory.name) == ("cores", "memory")
    assert "free" in memory.found
    assert broken.verdict == "bad"
    assert "KeyError" in broken.found
    assert "--force-reinstall" not in broken.remedy  # which would replace a PyTorch for CUDA


def test_every_outcome_to_act_on_has_a_remedy(machine) -> None:
    here = machine(LAPTOP, driver="550.1", num_cores=1, free_ram_bytes=GIB)
    checks = [
        check_build(here, "13.0", ["sm_89"], is_usable=True),
        check_build(here, None, [], is_usable=False),
        host.check_cores(here),
        host.check_ram(here),
        host.check_battery(SimpleNamespace(power_plugged=False, percent=40.0)),
        host.check_page_file(machine(platform="windows"), 2 * GIB),
        host.check_windows_folder(machine(platform="wsl"), Path("/mnt/c/work")),
        host.check_console("cp1252"),
    ]
    assert all(check.verdict in ("warning", "bad") and check.remedy for check in checks), checks


@pytest.mark.parametrize(
    ("capability", "driver", "build"),
    [
        ((8, 9), "580.65", "cu130"),
        ((8, 6), "535.10", "cu126"),
        ((7, 5), "580.65", "cu130"),
        ((6, 1), "580.65", "cu126"),
        ((7, 0), "525.60", "cu126"),
        ((12, 0), "580.65", "cu130"),
        ((12, 0), "550.10", "cu130"),
        ((3, 5), "470.10", None),
    ],
)
def test_the_wheel_fits_card_and_driver(capability: tuple[int, int], driver: str, build: str | None) -> None:
    assert fitting_build(capability, driver) == build


def test_a_build_is_judged_by_card_and_driver(machine) -> None:
    codes = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
    assert check_build(machine(LAPTOP), "13.0", codes, is_usable=True).verdict == "good"
    assert check_build(machine(), None, [], is_usable=False).verdict == "good"
    old_card = check_build(machine(PASCAL), "13.0", codes, is_usable=True)
    assert (old_card.verdict, "whl/cu126" in old_card.remedy) == ("bad", True)
    new_card = check_build(machine(BLACKWELL), "12.6", ["sm_80", "sm_86", "sm_90"], is_usable=True)
    assert (new_card.verdict, "whl/cu130" in new_card.remedy) == ("bad", True)
    old_driver = check_build(machine(LAPTOP, driver="560.1"), "13.0", codes, is_usable=False)
    assert (old_driver.verdict, "580" in old_driver.found, "cu126" in old_driver.remedy) == ("bad", True, True)
    assert check_build(machine(LAPTOP), "13.0", codes, is_usable=False).verdict == "bad"


def test_a_driver_is_missed_only_where_there_is_a_card(machine, tmp_path: Path) -> None:
    assert check_driver(machine(driver=None), tmp_path).verdict == "not applicable"
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n", encoding="ascii")
    (device / "class").write_text("0x030000\n", encoding="ascii")
    assert check_driver(machine(driver=None), tmp_path).verdict == "bad"
    (device / "class").write_text("0x040300\n", encoding="ascii")  # its sound
    assert check_driver(machine(driver=None), tmp_path).verdict == "not applicable"
    assert check_driver(machine(gpu_problem="it does not answer"), tmp_path).verdict == "bad"


def test_a_slower_card_is_not_chosen_in_silence(machine) -> None:
    both = machine(PASCAL, BLACKWELL)
    found = check_choice(both, "0")
    assert (found.verdict, "CUDA_VISIBLE_DEVICES=GPU-1" in found.remedy) == ("warning", True)
    assert check_choice(both, "1").verdict == "good"
    assert check_choice(machine(LAPTOP), "0").verdict == "not applicable"


class FakeNvml:
    """The library's answers for one card."""

    NVML_TEMPERATURE_GPU = NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 0
    nvmlClocksThrottleReasonSwThermalSlowdown, nvmlClocksThrottleReasonHwThermalSlowdown = 0x20, 0x40

    class NVMLError(Exception):
        pass

    def __init__(
        self, *, used: int = GIB, degrees: int = 60, reasons: int = 0, limit_w: int = 115, slows_at: int | None = 90
    ) -> None:
        self._used, self._degrees, self._reasons, self._limit = used, degrees, reasons, limit_w
        self._slows_at = slows_at

    def nvmlDeviceGetMemoryInfo(self, _: object) -> Any:
        return SimpleNamespace(used=self._used, free=8 * GIB - self._used, total=8 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, _: object) -> Any:
        return [SimpleNamespace(pid=2**31 - 1, usedGpuMemory=self._used)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, _: object) -> Any:
        raise self.NVMLError

    def nvmlDeviceGetTemperature(self, _: object, __: int) -> int:
        return self._degrees

    def nvmlDeviceGetTemperatureThreshold(self, _: object, __: int) -> int:
        if self._slows_at is None:
            raise self.NVMLError
        return self._slows_at

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _: object) -> int:
        return self._reasons

    def nvmlDeviceGetEnforcedPowerLimit(self, _: object) -> int:
        return 1000 * self._limit

    def nvmlDeviceGetPowerManagementDefaultLimit(self, _: object) -> int:
        return 115_000


def test_the_state_of_a_card_is_judged() -> None:
    assert check_memory(FakeNvml(), None).verdict == "good"
    full = check_memory(FakeNvml(used=5 * GIB), None)
    assert (full.verdict, "process 2147483647 5.0 GiB" in full.found) == ("warning", True)
    assert check_temperature(FakeNvml(), None).verdict == "good"
    assert check_temperature(FakeNvml(degrees=86), None).verdict == "warning"
    assert check_temperature(FakeNvml(reasons=0x40), None).verdict == "warning"
    silent = FakeNvml(slows_at=None, degrees=95)
    assert (check_temperature(silent, None).verdict, check_temperature(silent, None).found) == ("good", "95 °C")
    assert check_temperature(FakeNvml(slows_at=None, reasons=0x40), None).verdict == "warning"
    assert check_power(FakeNvml(), None).verdict == "good"
    assert check_power(FakeNvml(limit_w=60), None).verdict == "warning"


def test_memory_beyond_the_card_is_for_windows(machine) -> None:
    assert check_spill(machine(LAPTOP), 0).verdict == "not applicable"


def test_arithmetic_on_the_cpu_is_right_and_wrong_products_are_seen(machine, monkeypatch) -> None:
    assert arithmetic.check_product("cpu", machine()).verdict == "good"
    assert arithmetic.check_attention("cpu", machine()).verdict == "good"
    attend = torch.nn.functional.scaled_dot_product_attention

    def ignores_the_mask_in_bf16(q: torch.Tensor, *rest: torch.Tensor, is_causal: bool) -> torch.Tensor:
        return attend(q, *rest, is_causal=is_causal and q.dtype is torch.float32)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", ignores_the_mask_in_bf16)
    assert arithmetic.check_attention("cpu", machine()).verdict == "bad"


def test_a_disk_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch) -> None:
    found = host.check_disk("runs", tmp_path / "not" / "there")
    assert str(tmp_path) in found.found
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(host.psutil, "disk_usage", lambda _: SimpleNamespace(free=GIB))
    assert host.check_disk("runs", tmp_path).verdict == "bad"

    monkeypatch.setattr(host.psutil, "disk_usage", lambda _: SimpleNamespace(free=9 * GIB))
    assert "save_total_limit" in host.check_disk("runs", tmp_path).remedy
    assert "save_total_limit" not in host.check_disk("downloads", tmp_path).remedy

    def refuse(_: Path) -> float:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(host.psutil, "disk_usage", lambda _: SimpleNamespace(free=99 * GIB))
    monkeypatch.setattr(host, "_time_writing", lambda _: 60.0)
    assert host.check_disk("runs", tmp_path).verdict == "warning"
    monkeypatch.setattr(host, "_time_writing", refuse)
    read_only = host.check_disk("runs", tmp_path)
    assert (read_only.verdict, "Read-only" in read_only.found) == ("bad", True)


@pytest.fixture
def hub() -> Iterator[Callable[[bool], str]]:
    """A server of one file, on this machine, that honours ranges or does not."""
    servers = []

    def start(honours_ranges: bool) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = b"x" * (10 if honours_ranges else 600)
                self.send_response(206 if honours_ranges else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_hub_is_asked_for_a_part_of_a_file(hub: Callable[[bool], str], monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert check_hub(hub(True), is_offline=False).verdict == "good"
    whole = check_hub(hub(False), is_offline=False)
    assert (whole.verdict, "begin anew" in whole.found) == ("warning", True)
    gone = check_hub("http://127.0.0.1:9", is_offline=False, timeout_s=2)
    assert (gone.verdict, "HF_ENDPOINT" in gone.remedy) == ("warning", True)
    assert check_hub("no address", is_offline=False).verdict == "warning"
    assert check_hub("http://127.0.0.1:9", is_offline=True).verdict == "not applicable"
