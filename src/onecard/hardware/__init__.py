"""What a machine can do. No torch."""

from onecard.hardware.machine import Gpu, Machine, Platform
from onecard.hardware.probe import probe_machine

__all__ = ["Gpu", "Machine", "Platform", "probe_machine"]
