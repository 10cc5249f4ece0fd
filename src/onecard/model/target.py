"""The kind of device that code chooses its kernels for.

A plan for a GPU is traced on tensors without storage, which have to lie on the CPU: a fake CUDA device cannot run a
backward pass on a machine without one. What decides by device therefore asks here, and the tracer answers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_traced_as: str | None = None  # no context variable: the compiler would break its graph at one


def device_kind(device: torch.device) -> str:
    """`cpu` or `cuda`: what a device is, or stands for while a plan is traced."""
    return _traced_as or device.type


@contextmanager
def traced_as(kind: str) -> Iterator[None]:
    """Lets every device stand for one of `kind` inside the block."""
    global _traced_as
    before, _traced_as = _traced_as, kind
    try:
        yield
    finally:
        _traced_as = before
