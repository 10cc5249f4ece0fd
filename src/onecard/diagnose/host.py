"""The rest of the machine: battery, disks, cores, memory, console."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from onecard.diagnose.check import Check
from onecard.hardware import Machine
from onecard.units import GIB, MIB, format_bytes

_WRITTEN_BYTES = 64 * MIB
_PIECE_BYTES = 4 * MIB
_LEAST_DISK_BYTES, _FEW_DISK_BYTES = 2 * GIB, 20 * GIB
# A checkpoint of a gigabyte would take longer than ten seconds.
_SLOW_BYTES_PER_S = 100 * MIB
_LEAST_RAM_BYTES, _FEW_RAM_BYTES = 2 * GIB, 6 * GIB
# Windows commits memory that is never touched; PyTorch's CUDA libraries alone ask for about this much (error 1455).
_LEAST_PAGE_FILE_BYTES = 8 * GIB


def check_battery(battery: Any) -> Check:
    """Reads what `psutil.sensors_battery` gave: None where there is none."""
    name = "power supply"
    if battery is None:
        return Check(name, "not applicable", "no battery")
    if battery.power_plugged:
        return Check(name, "good", "plugged in")
    remedy = "plug it in: on battery a card runs at a part of its power, and the machine may sleep"
    return Check(name, "warning", f"on battery, {battery.percent:.0f}% left", remedy)


def check_disk(purpose: str, folder: Path) -> Check:
    """Writes 64 MiB in a folder (or the nearest that exists), which are removed again; asks for free space."""
    name = f"disk for {purpose}"
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = psutil.disk_usage(str(place)).free
    try:
        written_s = _time_writing(place) if free > _LEAST_DISK_BYTES else 0.0
    except OSError as error:
        return Check(name, "bad", f"{place} cannot be written to: {error.strerror or error}", _ELSEWHERE)
    speed = _WRITTEN_BYTES / written_s if written_s else None
    found = f"{place}: {format_bytes(free)} free" + (f", writes {format_bytes(speed)}/s" if speed else "")
    if free < _LEAST_DISK_BYTES:
        return Check(name, "bad", found, "free some space: a checkpoint alone can take gigabytes. " + _ELSEWHERE)
    if free < _FEW_DISK_BYTES:
        fewer = ", or keep fewer checkpoints: save_total_limit 2" if purpose == "runs" else ""
        return Check(name, "warning", found, f"free some space{fewer}")
    if speed is not None and speed < _SLOW_BYTES_PER_S:
        return Check(name, "warning", found, "a local SSD saves checkpoints faster. " + _ELSEWHERE)
    return Check(name, "good", found)


_ELSEWHERE = "Another place: --output-dir for runs, ONECARD_CACHE for prepared text, HF_HOME for downloads"


def _time_writing(folder: Path) -> float:
    piece = os.urandom(_PIECE_BYTES)  # a disk that compresses would shine with zeros
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(_WRITTEN_BYTES // _PIECE_BYTES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - started


def check_windows_folder(machine: Machine, folder: Path) -> Check:
    """Tells whether Linux in Windows works on a Windows disk, through a slow bridge."""
    name = "place of the files"
    if machine.platform != "wsl":
        return Check(name, "not applicable", "only within WSL")
    parts = folder.absolute().parts
    if len(parts) > 2 and parts[1] == "mnt" and len(parts[2]) == 1:
        found = f"{folder} is on a Windows disk, reached through a slow bridge"
        return Check(name, "warning", found, "work under your Linux home")
    return Check(name, "good", f"{folder} is on a Linux disk")


def check_cores(machine: Machine) -> Check:
    """Counts the cores this process may use."""
    found = f"{machine.num_cores} of {psutil.cpu_count() or machine.num_cores}"
    if machine.num_cores < 2:
        return Check("cores", "warning", found, "with one core data and training take turns: allow this process more")
    return Check("cores", "good", found)


def check_ram(machine: Machine) -> Check:
    """Looks at the memory that is free, not at all there is."""
    found = f"{format_bytes(machine.free_ram_bytes)} of {format_bytes(machine.ram_bytes)} free"
    if machine.free_ram_bytes < _LEAST_RAM_BYTES:
        return Check("memory", "bad", found, "end other programs: loading PyTorch and a model needs about 3 GiB")
    if machine.free_ram_bytes < _FEW_RAM_BYTES:
        remedy = "end other programs"
        if machine.platform == "wsl":
            remedy += "; WSL gets half of Windows' memory unless .wslconfig says more: [wsl2] memory=..."
        return Check("memory", "warning", found, remedy)
    return Check("memory", "good", found)


def check_page_file(machine: Machine, page_file_bytes: int) -> Check:
    """On Windows, a small page file ends programs while they load (error 1455)."""
    name = "page file"
    if machine.platform != "windows":
        return Check(name, "not applicable", "only on Windows")
    found = format_bytes(page_file_bytes)
    if page_file_bytes < _LEAST_PAGE_FILE_BYTES:
        remedy = "System, Advanced, Performance, Virtual memory: let Windows manage it, or 16384 MB"
        return Check(name, "warning", f"{found}: libraries may fail to load (error 1455)", remedy)
    return Check(name, "good", found)


def check_console(encoding: str | None) -> Check:
    """Tells whether the console can show Chinese and block characters."""
    name = "console"
    try:
        "中文 █ ±".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        remedy = "chcp 65001, or set PYTHONUTF8=1" if sys.platform == "win32" else "export LANG=C.UTF-8"
        return Check(name, "warning", f"{encoding or 'unknown'} cannot show all text: it becomes `?`", remedy)
    return Check(name, "good", f"{encoding} shows all text")
