"""Sensors, with an NVML of a few lines and with this machine."""

import os
from types import SimpleNamespace
from typing import Any

from onecard.hardware.sensors import CardReading, CardSensor, HostSensor

GIB = 1024**3


class SmallNvml:
    """The part of `pynvml` that the sensor uses; `broken` names functions that this card or driver lacks."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, broken: tuple[str, ...] = (), pids: tuple[int, ...] = ()) -> None:
        self.broken = broken
        self.pids = pids
        self.num_open = 0
        self.asked: list[str] = []

    def nvmlInit(self) -> None:
        self._answer("nvmlInit")
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return self._answer("nvmlDeviceGetHandleByUUID", "card")

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return self._answer("nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=83, memory=40))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return self._answer("nvmlDeviceGetMemoryInfo", SimpleNamespace(total=12 * GIB, free=4 * GIB, used=8 * GIB))

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return self._answer("nvmlDeviceGetTemperature", 71)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetCurrentClocksThrottleReasons", 0x1 | 0x4 | 0x20)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetPowerUsage", 165_500)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetEnforcedPowerLimit", 170_000)

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetPowerManagementDefaultLimit", 180_000)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> Any:
        held = [SimpleNamespace(pid=pid, usedGpuMemory=GIB) for pid in self.pids]
        return self._answer("nvmlDeviceGetComputeRunningProcesses", held)

    def _answer(self, name: str, value: Any = None) -> Any:
        if name in self.broken:
            raise self.NVMLError(name)
        return value


def test_a_card_is_read_whole() -> None:
    nvml = SmallNvml(pids=(os.getpid(), 1, 2))
    sensor = CardSensor(nvml, "aaaa-1")
    assert nvml.asked == ["GPU-aaaa-1"]
    assert sensor.read() == CardReading(
        gpu_share=0.83,
        temperature_c=71.0,
        power_w=165.5,
        power_limit_w=170.0,
        usual_power_limit_w=180.0,
        throttled_by=("sw_power_cap", "sw_thermal"),
        card_bytes=8 * GIB,
        card_total_bytes=12 * GIB,
        num_others=2,
        others_bytes=2 * GIB,
    )
    sensor.close()
    assert nvml.num_open == 0
    assert sensor.read() == CardReading()


def test_what_a_card_does_not_know_is_left_out() -> None:
    names = [name for name in vars(SmallNvml) if name.startswith("nvmlDeviceGet") and "UUID" not in name]
    for name in names:
        assert CardSensor(SmallNvml(broken=(name,)), "aaaa-1").read() != CardReading()
    assert CardSensor(SmallNvml(broken=tuple(names)), "aaaa-1").read() == CardReading()


def test_a_card_or_driver_that_is_not_there_reads_as_nothing() -> None:
    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID"):
        nvml = SmallNvml(broken=(name,))
        sensor = CardSensor(nvml, "aaaa-1")
        assert sensor.read() == CardReading()
        sensor.close()
        assert nvml.num_open == 0


def test_in_a_container_this_process_is_one_of_those_that_are_listed() -> None:
    alone = CardSensor(SmallNvml(pids=(10**7,)), "aaaa-1").read()
    assert (alone.num_others, alone.others_bytes) == (0, None)
    assert CardSensor(SmallNvml(pids=(10**7, 10**7 + 1)), "aaaa-1").read().num_others == 1
    assert CardSensor(SmallNvml(), "aaaa-1").read().num_others == 0


def test_this_machine_is_read() -> None:
    sensor = HostSensor()
    before = sensor.read()
    assert before.own_bytes is not None
    kept = b"x" * (256 << 20)
    after = sensor.read()
    assert after.own_bytes is not None
    # Linux counts resident pages per core and adds them up late: tens of MB are missing on a machine of many cores.
    assert 0.7 < (after.own_bytes - before.own_bytes) / len(kept) < 1.3
    assert after.free_ram_bytes
    assert after.cpu_share is not None
    assert 0 <= after.cpu_share <= 1
    assert after.own_cpu_share is not None
    assert after.own_cpu_share >= 0
    assert after.on_battery in (None, True, False)
