"""Looks at the machine this process runs on."""

import os
import platform
import sys
from pathlib import Path

import psutil

from onecard.hardware.machine import Machine, Platform
from onecard.hardware.nvidia import probe_gpus

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def probe_machine() -> Machine:
    """Describes this machine: the cards, cores and memory that this process may use.

    Takes milliseconds and never fails: what cannot be read is left out, with a reason where one matters.
    """
    import pynvml  # here, because it is needless work where only recipes are read

    gpus, driver, gpu_problem = probe_gpus(pynvml, os.environ)
    memory = psutil.virtual_memory()
    limit, used = memory_limit(_CGROUP)
    has_bf16, bf16_reason = find_cpu_bf16(_PROC, platform.machine())
    return Machine(
        gpus=gpus,
        gpu_problem=gpu_problem,
        driver=driver,
        num_cores=count_cores(_CGROUP),
        ram_bytes=min(memory.total, limit),
        free_ram_bytes=max(0, min(memory.available, limit - used)),
        platform=find_platform(sys.platform, _PROC),
        python=platform.python_version(),
        has_bf16_cpu=has_bf16,
        bf16_cpu_reason=bf16_reason,
    )


def count_cores(cgroup: Path) -> int:
    """Counts the cores that the scheduler and a container's quota leave to this process, at least one."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota(cgroup)
    return max(1, min(cores, int(quota))) if quota is not None else cores


def cpu_quota(cgroup: Path) -> float | None:
    """Reads a container's share of time in cores; None if it has no limit or the system knows none.

    Knows cgroup version 2 (`cpu.max`: quota and period in microseconds, or `max`) and version 1.
    """
    if both := _read_words(cgroup / "cpu.max"):
        quota, period = both[0], both[-1]
    else:
        quota = "".join(_read_words(cgroup / "cpu" / "cpu.cfs_quota_us"))
        period = "".join(_read_words(cgroup / "cpu" / "cpu.cfs_period_us"))
    # Version 1 writes -1 for no limit.
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None
    return int(quota) / int(period)


def memory_limit(cgroup: Path) -> tuple[int, int]:
    """Reads a container's memory limit and what counts against it, in bytes; a huge limit if there is none.

    Pages that only cache files are given back on demand, so they do not count.
    """
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        given = "".join(_read_words(cgroup / limit))
        if given.isdigit():
            words = _read_words((cgroup / limit).with_name("memory.stat"))
            cached = int(words[words.index(cache) + 1]) if cache in words else 0
            return int(given), max(0, int("".join(_read_words(cgroup / used)) or 0) - cached)
    return sys.maxsize, 0


def find_platform(system: str, proc: Path) -> Platform:
    """Names the platform from `sys.platform`; Linux inside Windows tells by its kernel's name."""
    if system.startswith("win"):
        return "windows"
    if system == "darwin":
        return "macos"
    return "wsl" if "microsoft" in " ".join(_read_words(proc / "version")).lower() else "linux"


def find_cpu_bf16(proc: Path, architecture: str) -> tuple[bool, str]:
    """Says whether the CPU multiplies bf16 in hardware (AMX or AVX-512), and how that is known.

    Without it bf16 is emulated and slower than fp32.
    """
    words = set(_read_words(proc / "cpuinfo"))
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in words:
            return True, f"/proc/cpuinfo lists {flag}"
    if "flags" in words:
        return False, "/proc/cpuinfo lists neither amx_bf16 nor avx512_bf16"
    return False, f"unknown on this system ({architecture}), so taken as absent"


def _read_words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []
