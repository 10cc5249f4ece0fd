"""What a card does now, read from a driver that does not always tell all of it."""

from types import SimpleNamespace
from typing import Any

from onecard.hardware.nvidia import Gauges, read_gauges


class SmallNvml:
    """The part of `pynvml` that gauges are read from; `silent` names functions that fail."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, *silent: str) -> None:
        self._silent = silent
        self.is_open = False

    def _answer(self, name: str, value: Any) -> Any:
        if name in self._silent:
            raise self.NVMLError(name)
        return value

    def nvmlInit(self) -> None:
        self._answer("init", None)
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return int(self._answer("handle", index))

    def nvmlDeviceGetMemoryInfo(self, _: int) -> Any:
        return SimpleNamespace(used=3, total=8)

    def nvmlDeviceGetUtilizationRates(self, _: int) -> Any:
        return self._answer("utilisation", SimpleNamespace(gpu=97))

    def nvmlDeviceGetTemperature(self, _: int, __: int) -> Any:
        return self._answer("temperature", 71)

    def nvmlDeviceGetPowerUsage(self, _: int) -> Any:
        return self._answer("power", 95_000)


def test_gauges_are_read_and_the_library_is_closed() -> None:
    nvml = SmallNvml()
    assert read_gauges(nvml, 0) == Gauges(3, 8, 0.97, 71, 95.0)
    assert not nvml.is_open


def test_what_a_driver_does_not_say_is_none() -> None:
    assert read_gauges(SmallNvml("power", "utilisation"), 0) == Gauges(3, 8, None, 71, None)
    assert read_gauges(SmallNvml("init"), 0) is None
    gone = SmallNvml("handle")
    assert read_gauges(gone, 3) is None
    assert not gone.is_open
