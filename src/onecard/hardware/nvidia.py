"""NVIDIA cards through their driver's management library (NVML), without CUDA or torch."""

from collections.abc import Mapping
from typing import Any

from onecard.hardware.machine import Gpu

# Values by which people hide every card on purpose.
_HIDE_ALL = ("", "-1", "none", "NoDevFiles")


def probe_gpus(nvml: Any, environ: Mapping[str, str]) -> tuple[tuple[Gpu, ...], str | None, str | None]:
    """Reads all visible cards with a `pynvml` module.

    Returns the cards, the driver's version, and what went wrong. A machine without a driver has no cards and no
    problem; one card that cannot be read does not hide the others.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return (), None, None if _is_driver_missing(nvml, error) else f"the NVIDIA driver does not answer: {error}"
    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        gpus, problem = _read_cards(nvml, driver)
        variable = environ.get("CUDA_VISIBLE_DEVICES")
        visible = _visible(gpus, variable)
        if gpus and not visible and variable not in _HIDE_ALL:
            problem = f"CUDA_VISIBLE_DEVICES is {variable!r}, which names none of the {len(gpus)} cards here"
        return visible, driver, problem
    except nvml.NVMLError as error:
        return (), None, f"the NVIDIA driver cannot list its cards: {error}"
    finally:
        nvml.nvmlShutdown()


def _read_cards(nvml: Any, driver: str) -> tuple[list[Gpu], str | None]:
    gpus, problems = [], []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus.append(_read_card(nvml, index, driver))
        except nvml.NVMLError as error:
            problems.append(f"GPU {index} cannot be read: {error}")
    return gpus, "; ".join(problems) or None


def _read_card(nvml: Any, index: int, driver: str) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        compute_capability=(int(major), int(minor)),
        driver=driver,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
    )


def _is_driver_missing(nvml: Any, error: Exception) -> bool:
    """The library comes with the driver: without library or kernel module there is no NVIDIA card to speak of."""
    return getattr(error, "value", None) in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)


def _visible(gpus: list[Gpu], variable: str | None) -> tuple[Gpu, ...]:
    """Selects cards as CUDA does: by number or by the start of their uuid, up to the first that does not exist."""
    if variable is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in variable.split(",")):
        found = [gpu for gpu in gpus if (entry == str(gpu.index) if entry.isdigit() else _has_uuid(gpu, entry))]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return tuple(chosen)


def _has_uuid(gpu: Gpu, start: str) -> bool:
    return start.startswith("GPU-") and gpu.uuid.startswith(start)


def _text(value: str | bytes) -> str:
    """Older versions of nvidia-ml-py give bytes."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
