"""Times the card in the machine and makes a local row of it."""

import datetime
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from onecard.errors import InputError
from onecard.hardware import Gpu, Machine
from onecard.hardware.card_row import runs_on
from onecard.planner.device import choose_device
from onecard.planner.measure import synchronize
from onecard.units import GIB, MIB

Progress = Callable[[str], None]

# A context outside this range means that another program's memory was counted in.
_CONTEXT_BYTES = (64 * MIB, 4 * GIB)
# Waiting for the device costs some microseconds, which a long group hides.
_GROUP_S = 0.02
_MIN_GROUPS = 3


@dataclass(frozen=True)
class Effort:
    """How large the operations are and how long each is repeated.

    The matrices are large enough to reach the card's best rate and small enough for one of 4 GB; the buffer is several
    times the largest cache of the catalogue. Half a second of repeats shows what the card sustains, not a boost.
    """

    matrix_size: int = 8192
    copy_bytes: int = 512 * MIB
    num_launches: int = 2000
    seconds: float = 0.5


def measure_present_card(machine: Machine, progress: Progress) -> tuple[str, dict[str, Any]]:
    """Times the first visible card for about five seconds; gives the name and the content of its local row.

    Raises:
        InputError: there is no card, or PyTorch cannot use it.
    """
    if not (machine.gpus and torch.cuda.is_available()):
        reason = machine.gpu_problem or choose_device("auto", machine)[1]
        raise InputError(f"there is no card to measure: {reason}. Run the command on the machine that has it")
    used_before = {gpu.uuid: _used_bytes(gpu) for gpu in machine.gpus}  # torch makes contexts when it looks at cards
    index, gpu = _match(machine.gpus)
    _check_build(gpu)
    device = torch.device("cuda", index)
    try:
        row = measure_rates(device, Effort(), gpu.compute_capability >= (8, 0), progress)
    except torch.OutOfMemoryError as error:
        raise InputError(f"{gpu.name} has too little free memory to be measured: end what else uses it") from error
    row = _describe(gpu, torch.cuda.get_device_properties(device)) | row
    row["visible_gib"] = torch.cuda.mem_get_info(device)[1] / GIB
    context = _used_bytes(gpu) - used_before[gpu.uuid] - torch.cuda.memory_reserved(device)
    if _CONTEXT_BYTES[0] <= context <= _CONTEXT_BYTES[1]:
        row["measured_context_gib"] = context / GIB
    return local_key(gpu.name), row


def measure_rates(device: torch.device, effort: Effort, has_bf16: bool, progress: Progress) -> dict[str, float]:
    """Times matrix products, copies and launches on any device, a CPU included; gives the rates of a row."""
    rates: dict[str, float] = {}
    progress("matrix products in fp32")
    with _fp32_precision("ieee"):
        rates["fp32_flops"] = time_matmul(device, torch.float32, effort)
    if has_bf16:
        progress("matrix products in tf32")
        with _fp32_precision("tf32"):
            rates["tf32_flops"] = time_matmul(device, torch.float32, effort)
        progress("matrix products in bf16")
        rates["flops_16bit"] = time_matmul(device, torch.bfloat16, effort)
    progress("matrix products in fp16")
    rates["fp16_flops"] = time_matmul(device, torch.float16, effort)
    rates.setdefault("flops_16bit", rates["fp16_flops"])
    progress("memory")
    rates["bandwidth_bytes_per_s"] = time_copy(device, effort)
    progress("launches")
    rates["launch_s"] = time_launch(device, effort)
    return rates


def time_matmul(device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    """FLOP/s of a square matrix product on random data, which draws more power than zeros."""
    size = effort.matrix_size
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _seconds(lambda: torch.mm(left, right, out=out), device, effort.seconds)


def time_copy(device: torch.device, effort: Effort) -> float:
    """Bytes read and written per second when a large buffer is copied within the device."""
    source = torch.ones(effort.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * effort.copy_bytes / _seconds(lambda: target.copy_(source), device, effort.seconds)


def time_launch(device: torch.device, effort: Effort) -> float:
    """Seconds that Python and the driver need to launch one tiny kernel, when many follow one another."""
    value = torch.zeros(1, device=device)

    def launch_all() -> None:
        for _ in range(effort.num_launches):
            value.add_(1)

    return _seconds(launch_all, device, effort.seconds) / effort.num_launches


def local_key(driver_name: str) -> str:
    """`NVIDIA GeForce RTX 4060 Laptop GPU` -> `local-rtx-4060-laptop`."""
    words = "".join(letter if letter.isalnum() else " " for letter in driver_name.lower()).split()
    return "-".join(["local", *(word for word in words if word not in ("nvidia", "geforce", "gpu"))])


def _seconds(operation: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median time of one run. Runs follow one another without waiting, as in training, in groups of 20 ms."""
    _time_group(operation, device, 1)
    size = max(1, round(_GROUP_S / _time_group(operation, device, 1)))
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < _MIN_GROUPS or time.perf_counter() - started < seconds:
        times.append(_time_group(operation, device, size) / size)
    return statistics.median(times)


def _time_group(operation: Callable[[], Any], device: torch.device, size: int) -> float:
    synchronize(str(device))
    started = time.perf_counter()
    for _ in range(size):
        operation()
    synchronize(str(device))
    return time.perf_counter() - started


@contextmanager
def _fp32_precision(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _match(gpus: tuple[Gpu, ...]) -> tuple[int, Gpu]:
    """Finds a card that torch and the driver both show; torch may count in another order, and writes no `GPU-`."""
    for index in range(torch.cuda.device_count()):
        uuid = str(torch.cuda.get_device_properties(index).uuid).lower()
        for gpu in gpus:
            if gpu.uuid.lower().removeprefix("gpu-") == uuid:
                return index, gpu
    names = ", ".join(gpu.name for gpu in gpus)
    raise InputError(f"none of the cards that the driver shows ({names}) is among PyTorch's; a part of a card (MIG)?")


def _check_build(gpu: Gpu) -> None:
    """Refuses a card that PyTorch shows but has no machine code for: the first operation would fail."""
    found = (re.match(r"sm_(\d+)(\d)", architecture) for architecture in torch.cuda.get_arch_list())
    inside = tuple((int(match[1]), int(match[2])) for match in found if match)
    if inside and not runs_on(gpu.compute_capability, inside):
        own, others = (
            ", ".join(f"{major}.{minor}" for major, minor in some) for some in ((gpu.compute_capability,), inside)
        )
        raise InputError(
            f"{gpu.name} has compute capability {own}, and PyTorch {torch.__version__} is built for {others}: "
            "install the build that `onecard cards` lists for the card"
        )


def _describe(gpu: Gpu, properties: Any) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "driver_names": [gpu.name],
        "source": f"onecard cards --measure with PyTorch {torch.__version__}, driver {gpu.driver}",
        "date": datetime.date.today(),
        "memory_gib": gpu.total_bytes / GIB,
        "compute_capability": ".".join(map(str, gpu.compute_capability)),
        "num_sms": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / MIB,
    }


def _used_bytes(gpu: Gpu) -> int:
    """All memory in use on the card, as the driver counts it: torch cannot see its own context."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(gpu.index)).used)
    finally:
        pynvml.nvmlShutdown()
