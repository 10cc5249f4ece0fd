"""All tests of a machine, by name and in the order in which they are told: each with the seconds it may take."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onecard.diagnose.check import Check
from onecard.hardware import Machine

# Each imports what it needs when it is called: a broken library must not keep the other tests from running.
Test = Callable[[Machine], Check]


@dataclass(frozen=True)
class Entry:
    """A test, and the time after which it counts as hanging; importing PyTorch, the first time, is included.

    `remedy` is for a test that hangs or ends its process.
    """

    run: Test
    limit_s: float
    remedy: str = "restart the machine; if that does not help, install the driver and PyTorch anew"


def _driver(machine: Machine) -> Check:
    from onecard.diagnose.driver import check_driver

    return check_driver(machine)


def _build(machine: Machine) -> Check:
    import torch

    from onecard.diagnose.driver import check_build

    codes = torch.cuda.get_arch_list() if torch.version.cuda else []
    return check_build(machine, torch.version.cuda, codes, is_usable=torch.cuda.is_available())


def _choice(machine: Machine) -> Check:
    import torch

    from onecard.diagnose.driver import check_choice

    first = str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else None
    return check_choice(machine, first)


def _on_gpu(name: str, run: Callable[[Machine], Check]) -> Test:
    def test(machine: Machine) -> Check:
        import torch

        if not (machine.gpus and torch.cuda.is_available()):
            return Check(name, "not applicable", "no GPU that PyTorch can use")
        return run(machine)

    return test


def _product(device: str) -> Test:
    def test(machine: Machine) -> Check:
        from onecard.diagnose.arithmetic import check_product

        return check_product(device, machine)

    return test


def _attention(device: str) -> Test:
    def test(machine: Machine) -> Check:
        from onecard.diagnose.arithmetic import check_attention

        return check_attention(device, machine)

    return test


def _compile(machine: Machine) -> Check:
    from onecard.diagnose.arithmetic import check_compile

    return check_compile(_device(machine), machine)


def _bitsandbytes(machine: Machine) -> Check:
    from onecard.diagnose.arithmetic import check_bitsandbytes

    return check_bitsandbytes(_device(machine))


def _device(machine: Machine) -> str:
    import torch

    return "cuda:0" if machine.gpus and torch.cuda.is_available() else "cpu"


def _of_card(name: str, which: str) -> Test:
    """A test through the driver's library alone, which also answers where PyTorch does not reach the card."""

    def test(machine: Machine) -> Check:
        if not machine.gpus:
            return Check(name, "not applicable", "no GPU")
        import pynvml

        from onecard.diagnose import card_state

        try:
            with card_state.opened_card(machine) as (nvml, handle):
                check: Check = getattr(card_state, which)(nvml, handle)
        except pynvml.NVMLError as error:  # laptops and virtual machines do not tell everything
            return Check(name, "not applicable", f"the driver does not say: {error}")
        return check

    return test


def _spill(machine: Machine) -> Check:
    import torch

    from onecard.diagnose.card_state import check_spill

    return check_spill(machine, torch.cuda.mem_get_info(0)[0] if machine.platform in ("windows", "wsl") else 0)


def _battery(_: Machine) -> Check:
    import psutil

    from onecard.diagnose.host import check_battery

    return check_battery(psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None)


def _disk(purpose: str, find: Callable[[], Path]) -> Test:
    def test(_: Machine) -> Check:
        from onecard.diagnose.host import check_disk

        return check_disk(purpose, find())

    return test


def _prepared_text() -> Path:
    from onecard.data.cache import cache_folder

    return cache_folder()


def _downloads() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _place(machine: Machine) -> Check:
    from onecard.diagnose.host import check_windows_folder

    return check_windows_folder(machine, Path.cwd())


def _cores(machine: Machine) -> Check:
    from onecard.diagnose.host import check_cores

    return check_cores(machine)


def _ram(machine: Machine) -> Check:
    from onecard.diagnose.host import check_ram

    return check_ram(machine)


def _page_file(machine: Machine) -> Check:
    import psutil

    from onecard.diagnose.host import check_page_file

    return check_page_file(machine, psutil.swap_memory().total if machine.platform == "windows" else 0)


def _hub(_: Machine) -> Check:
    from huggingface_hub import constants

    from onecard.diagnose.network import check_hub

    return check_hub(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, is_offline=constants.HF_HUB_OFFLINE)


_DISK = "look at this disk: a network share that is gone, or a drive that fails, does not answer"
_NETWORK = "look at the network, its proxy (HTTPS_PROXY) and HF_ENDPOINT: nothing answers there"
_SYSTEM = "restart the machine, and look into the log of the system"

TESTS: dict[str, Entry] = {
    "NVIDIA driver": Entry(_driver, 60),
    "PyTorch's build": Entry(_build, 90),
    "choice of GPU": Entry(_choice, 60),
    "matrix product on the GPU": Entry(_on_gpu("matrix product on the GPU", _product("cuda:0")), 60),
    "attention on the GPU": Entry(_on_gpu("attention on the GPU", _attention("cuda:0")), 60),
    "matrix product on the CPU": Entry(_product("cpu"), 60),
    "attention on the CPU": Entry(_attention("cpu"), 60),
    "torch.compile": Entry(_compile, 180),
    "bitsandbytes": Entry(_bitsandbytes, 90),
    "GPU memory": Entry(_of_card("GPU memory", "check_memory"), 30),
    "memory beyond the card": Entry(_on_gpu("memory beyond the card", _spill), 60),
    "GPU temperature": Entry(_of_card("GPU temperature", "check_temperature"), 30),
    "GPU power limit": Entry(_of_card("GPU power limit", "check_power"), 30),
    "power supply": Entry(_battery, 30, _SYSTEM),
    "disk for runs": Entry(_disk("runs", lambda: Path.cwd() / "runs"), 60, _DISK),
    "disk for prepared text": Entry(_disk("prepared text", _prepared_text), 60, _DISK),
    "disk for downloads": Entry(_disk("downloads", _downloads), 60, _DISK),
    "place of the files": Entry(_place, 30, _DISK),
    "cores": Entry(_cores, 30, _SYSTEM),
    "memory": Entry(_ram, 30, _SYSTEM),
    "page file": Entry(_page_file, 30, _SYSTEM),
    "Hugging Face Hub": Entry(_hub, 60, _NETWORK),
}
