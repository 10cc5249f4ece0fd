"""What sensors of the machine say at a moment: the card through NVML, the rest through psutil."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

_Read = TypeVar("_Read")

# NVML's bits of what holds a clock down. That a card idles, or keeps to its own power limit, is as it should be.
_THROTTLING = {
    0x0000000000000004: "sw_power_cap",
    0x0000000000000020: "sw_thermal",
    0x0000000000000040: "hw_thermal",
    0x0000000000000080: "power_brake",
}


@dataclass(frozen=True)
class CardReading:
    """One card; None where it does not answer. Shares lie between 0 and 1; `num_others` compute beside this process."""

    gpu_share: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    usual_power_limit_w: float | None = None
    throttled_by: tuple[str, ...] = ()
    card_bytes: int | None = None
    card_total_bytes: int | None = None
    num_others: int | None = None
    others_bytes: int | None = None


@dataclass(frozen=True)
class HostReading:
    """The host; `own_bytes` is private memory, so that mapped files do not count. CPU shares are of all cores."""

    own_bytes: int | None = None
    free_ram_bytes: int | None = None
    cpu_share: float | None = None
    own_cpu_share: float | None = None
    on_battery: bool | None = None


class CardSensor:
    """Reads one card by its uuid; a card that cannot be found reads as nothing at all. Close it."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._handle: Any = None
        self._is_open = False
        try:
            nvml.nvmlInit()
            self._is_open = True
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._usual_limit_w = self._watts("nvmlDeviceGetPowerManagementDefaultLimit")
        except nvml.NVMLError:
            self._handle = None

    def read(self) -> CardReading:
        if self._handle is None:
            return CardReading()
        load = self._ask("nvmlDeviceGetUtilizationRates")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        degrees = self._ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU)
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        num_others, others_bytes = self._others()
        return CardReading(
            gpu_share=None if load is None else load.gpu / 100,
            temperature_c=None if degrees is None else float(degrees),
            power_w=self._watts("nvmlDeviceGetPowerUsage"),
            power_limit_w=self._watts("nvmlDeviceGetEnforcedPowerLimit"),
            usual_power_limit_w=self._usual_limit_w,
            throttled_by=tuple(name for bit, name in _THROTTLING.items() if bits & bit),
            card_bytes=None if memory is None else int(memory.used),
            card_total_bytes=None if memory is None else int(memory.total),
            num_others=num_others,
            others_bytes=others_bytes,
        )

    def close(self) -> None:
        if self._is_open:
            self._nvml.nvmlShutdown()
        self._is_open, self._handle = False, None

    def _others(self) -> tuple[int | None, int | None]:
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if processes is None:
            return None, None
        own = [process for process in processes if process.pid == os.getpid()]
        others = [process for process in processes if process.pid != os.getpid()]
        if not own and others:
            # In a container NVML counts processes by the numbers of the host, so one of them is this one; which, and
            # so what the others hold, is not known.
            return len(others) - 1, None
        # Windows keeps the memory of single processes to itself.
        held = [process.usedGpuMemory for process in others if process.usedGpuMemory is not None]
        return len(others), sum(held) if held else None

    def _watts(self, function: str) -> float | None:
        milliwatts = self._ask(function)
        return None if milliwatts is None else milliwatts / 1000

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Calls NVML; None where this card or driver does not know."""
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None


class HostSensor:
    """Reads this process and the machine around it; CPU shares are those since the reading before."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._num_cores = psutil.cpu_count() or 1
        psutil.cpu_percent()
        self._process.cpu_percent()

    def read(self) -> HostReading:
        cpu, own_cpu = _quietly(psutil.cpu_percent), _quietly(self._process.cpu_percent)
        available = _quietly(lambda: psutil.virtual_memory().available)
        return HostReading(
            own_bytes=_quietly(self._private_bytes),
            free_ram_bytes=available,
            cpu_share=None if cpu is None else cpu / 100,
            own_cpu_share=None if own_cpu is None else own_cpu / 100 / self._num_cores,
            on_battery=_quietly(_is_on_battery),
        )

    def _private_bytes(self) -> int:
        memory = self._process.memory_info()
        # Linux counts mapped files, such as the tokens of a corpus, as resident and shared; Windows has a word for it.
        return int(getattr(memory, "private", memory.rss - getattr(memory, "shared", 0)))


def _is_on_battery() -> bool | None:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def _quietly(read: Callable[[], _Read]) -> _Read | None:
    """A sensor that fails tells nothing; it never ends a run."""
    try:
        return read()
    except (psutil.Error, OSError, RuntimeError, NotImplementedError):
        return None
