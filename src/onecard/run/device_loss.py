"""A GPU that is gone for this process: after suspend, a driver reset, an Xid error."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from onecard.errors import DeviceLostError
from onecard.training.state import TrainState


@contextmanager
def explained_device_loss(device: torch.device, state: TrainState | None = None) -> Iterator[None]:
    """Turns an error after which this process can use its GPU no more into one that says so.

    `state` is the run on it; None while it is being loaded.

    Raises:
        DeviceLostError: a new process is needed; the supervisor starts one.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not _is_lost(error, device):
            raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        when = "while the run was being loaded" if state is None else f"after step {state.progress.step}"
        raise DeviceLostError(
            f"the GPU cannot be used by this process any more {when} ({reason}): the driver was "
            "reset, the machine slept, or the card had a fault. Everything up to the last checkpoint is kept: "
            "resume the run; if it happens again, look for Xid in `dmesg` and at the card's temperature and power"
        ) from error


def _is_lost(error: RuntimeError, device: torch.device) -> bool:
    if isinstance(error, torch.AcceleratorError):
        return True
    if device.type != "cuda":
        return False
    try:  # an error of cuBLAS or cuDNN has no type of its own; a context that is gone fails at everything
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
