"""The state of the card now: memory and who holds it, temperature, power."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from onecard.diagnose.check import Check
from onecard.hardware import Machine
from onecard.units import GIB, format_bytes

# A desktop and a browser take about as much.
_USUAL_BYTES = int(1.5 * GIB)
# Degrees below the point at which a card slows itself down.
_NEAR_SLOWDOWN = 6
_LEAST_POWER_SHARE = 0.9
_SHOWN_PROCESSES = 4


@contextmanager
def opened_card(machine: Machine) -> Iterator[tuple[Any, Any]]:
    """Opens the management library at the first visible card: gives the library and the card's handle."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml, pynvml.nvmlDeviceGetHandleByIndex(machine.gpus[0].index)
    finally:
        pynvml.nvmlShutdown()


def check_memory(nvml: Any, handle: Any) -> Check:
    """Says how much of a card's memory is free and which programs hold the rest."""
    name = "GPU memory"
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    found = f"{format_bytes(memory.free)} of {format_bytes(memory.total)} free"
    holders = _holders(nvml, handle)
    if holders:
        found += "; held by " + ", ".join(holders[:_SHOWN_PROCESSES])
    if memory.used > max(_USUAL_BYTES, 0.1 * memory.total):
        return Check(name, "warning", found, "end programs that use the card; games and browsers count, too")
    return Check(name, "good", found)


def _holders(nvml: Any, handle: Any) -> list[str]:
    """Programs on the card with the most first; on Windows the driver does not say how much each has."""
    found: dict[int, int | None] = {}
    for read in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            found |= {process.pid: process.usedGpuMemory for process in read(handle)}
        except nvml.NVMLError:
            continue
    rows = sorted(found.items(), key=lambda row: -(row[1] or 0))
    return [_program(pid) + (f" {format_bytes(size)}" if size else "") for pid, size in rows]


def _program(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).name()} ({pid})"
    except psutil.Error:  # of another user, or gone
        return f"process {pid}"


def check_temperature(nvml: Any, handle: Any) -> Check:
    """Compares the temperature with the one at which the card slows down, and asks whether it does."""
    name = "GPU temperature"
    degrees = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    limit = _slowdown_c(nvml, handle)
    slowed = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & (
        nvml.nvmlClocksThrottleReasonSwThermalSlowdown | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
    )
    found = f"{degrees} °C" + (f"; it slows down at {limit} °C" if limit is not None else "")
    if slowed or (limit is not None and degrees >= limit - _NEAR_SLOWDOWN):
        is_slow = ", and does now" if slowed else ""
        return Check(name, "warning", found + is_slow, "clean the fans, lift the laptop, or lower the power limit")
    return Check(name, "good", found)


def _slowdown_c(nvml: Any, handle: Any) -> int | None:
    try:
        return int(nvml.nvmlDeviceGetTemperatureThreshold(handle, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN))
    except nvml.NVMLError:  # many a GeForce does not tell
        return None


def check_power(nvml: Any, handle: Any) -> Check:
    """Compares the power limit with the card's own."""
    name = "GPU power limit"
    limit, own = (
        read(handle) / 1000
        for read in (nvml.nvmlDeviceGetEnforcedPowerLimit, nvml.nvmlDeviceGetPowerManagementDefaultLimit)
    )
    found = f"{limit:.0f} W of {own:.0f} W"
    if limit < _LEAST_POWER_SHARE * own:
        remedy = (
            f"if that is not on purpose: nvidia-smi -pl {own:.0f} (sudo, or as administrator), or the power profile of "
            "the laptop"
        )
        return Check(name, "warning", found, remedy)
    return Check(name, "good", found)


def check_spill(machine: Machine, free_bytes: int) -> Check:
    """Asks the card for more memory than is free: a driver that gives it would move training into slow host memory."""
    name = "memory beyond the card"
    if machine.platform not in ("windows", "wsl"):
        return Check(name, "not applicable", "only the driver for Windows lends host memory")
    try:
        taken = torch.empty(free_bytes + GIB, dtype=torch.uint8, device="cuda:0")  # nothing is written to it
    except torch.OutOfMemoryError:
        return Check(name, "good", "the driver refuses more than the card has")
    del taken
    torch.cuda.empty_cache()
    return Check(
        name,
        "warning",
        "the driver lends host memory, which is slower than its own; onecard's own limit keeps runs out of it",
        "NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback",
    )
