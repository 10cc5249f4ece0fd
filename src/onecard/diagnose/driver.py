"""The NVIDIA driver, PyTorch's build and the card: whether they belong together."""

import re
import sys
from pathlib import Path

import torch

from onecard.diagnose.check import Check
from onecard.hardware import Machine, card_of
from onecard.hardware.card_row import runs_on
from onecard.hardware.catalogue import catalogue_defaults

# NVIDIA's table of minimum drivers by major version of CUDA (docs/installation.md).
_LEAST_DRIVERS = {12: 525, 13: 580}
# The usual build first; PyTorch's own names.
_BUILDS = ("cu130", "cu126")
_INDEX = "https://download.pytorch.org/whl"
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"


def check_driver(machine: Machine, pci: Path = _PCI) -> Check:
    """Tells whether a driver answers where there is an NVIDIA card."""
    name = "NVIDIA driver"
    if machine.gpu_problem:
        remedy = "correct CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE" in machine.gpu_problem else _REPAIR
        return Check(name, "bad", machine.gpu_problem, remedy)
    if machine.driver is not None:
        return Check(name, "good", f"{machine.driver}, {len(machine.gpus)} visible GPU(s)")
    if has_nvidia_card(pci):
        return Check(name, "bad", "there is an NVIDIA card, but no driver", "install NVIDIA's driver, 580 or newer")
    return Check(name, "not applicable", "no NVIDIA card and no driver: training runs on the CPU")


_REPAIR = "restart the machine; if that does not help, install NVIDIA's driver anew"


def has_nvidia_card(pci: Path) -> bool:
    """Whether an NVIDIA display controller is plugged in, as Linux lists it; False on other systems."""
    for device in pci.glob("*"):
        try:
            vendor, kind = ((device / part).read_text(encoding="ascii").strip() for part in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(_DISPLAY):
            return True
    return False


def check_build(machine: Machine, cuda: str | None, codes: list[str], *, is_usable: bool) -> Check:
    """Compares PyTorch's build with driver and cards; names the wheel that fits.

    `cuda` is the version PyTorch was built for, None without; `codes` are the architectures in it.
    """
    name = "PyTorch's build"
    build = f"{torch.__version__} for CUDA {cuda}" if cuda else f"{torch.__version__} without CUDA"
    if not machine.gpus:
        return Check(name, "good", f"{build}; there is no GPU to use") if not cuda else _unused(name, build)
    gpu = machine.gpus[0]
    wheel = fitting_build(gpu.compute_capability, machine.driver)
    if wheel is None:
        found = (
            f"{build}; no usual build has code for {gpu.name} (compute capability {_dotted(gpu.compute_capability)})"
        )
        return Check(name, "bad", found, "train with --device cpu, or build PyTorch for this card yourself")
    install = f"install the {wheel} build: pip install --force-reinstall torch --index-url {_INDEX}/{wheel}"
    if cuda is None:
        return Check(name, "bad", f"{build}, so {gpu.name} lies idle", install)
    inside = tuple((int(match[1]), int(match[2])) for code in codes if (match := re.match(r"sm_(\d+)(\d)", code)))
    if inside and not runs_on(gpu.compute_capability, inside):
        return Check(name, "bad", f"{build} has no code for {gpu.name}", install)
    least = _LEAST_DRIVERS.get(int(cuda.partition(".")[0]), 0)
    if _major(machine.driver) < least:
        found = f"{build} needs driver {least} or newer, and here is {machine.driver}"
        return Check(name, "bad", found, f"update the driver, or {install}")
    if not is_usable:
        return Check(name, "bad", f"{build} does not reach {gpu.name}", _REPAIR)
    return Check(name, "good", f"{build} fits {gpu.name} and driver {machine.driver}")


def _unused(name: str, build: str) -> Check:
    return Check(name, "good", f"{build}; no GPU is visible, so its CUDA part is unused")


def fitting_build(capability: tuple[int, int], driver: str | None) -> str | None:
    """Names the build of PyTorch that has code for a card and runs on its driver; one for a newer driver if none."""
    inside = catalogue_defaults().builds
    having = [build for build in _BUILDS if runs_on(capability, inside[build])]
    running = [build for build in having if _major(driver) >= _LEAST_DRIVERS[int(build[2:4])]]
    return next(iter(running or having), None)


def check_choice(machine: Machine, first: str | None) -> Check:
    """Says which of several cards is used: `first` is the uuid of PyTorch's cuda:0."""
    name = "choice of GPU"
    if len(machine.gpus) < 2:
        return Check(
            name, "not applicable", "there is no choice: " + (machine.gpus[0].name if machine.gpus else "no GPU")
        )
    chosen = next((gpu for gpu in machine.gpus if first and gpu.uuid.lower().endswith(first.lower())), machine.gpus[0])
    known = [(gpu, card_of(gpu)) for gpu in machine.gpus]
    speeds = {gpu.uuid: (card.flops_16bit or card.fp32_flops) for gpu, card in known if card is not None}
    best = max(machine.gpus, key=lambda gpu: (speeds.get(gpu.uuid, 0.0), gpu.total_bytes))
    found = f"onecard takes {chosen.name} (number {chosen.index} of nvidia-smi) of {len(machine.gpus)}"
    if speeds.get(best.uuid, 0.0) > 1.1 * speeds.get(chosen.uuid, 0.0) > 0:
        set_it = "set" if sys.platform == "win32" else "export"
        return Check(
            name, "warning", f"{found}, but {best.name} is faster", f"{set_it} CUDA_VISIBLE_DEVICES={best.uuid}"
        )
    return Check(name, "good", found)


def _major(driver: str | None) -> int:
    found = re.match(r"\d+", driver or "")
    return int(found[0]) if found else 0


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
