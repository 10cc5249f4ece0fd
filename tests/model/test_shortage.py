"""Memory that runs out is recognised by whichever name it comes."""

import errno
import gc
import weakref

import pytest
import torch

from onecard.model.shortage import Shortage, attempt, is_out_of_memory

CPU = torch.device("cpu")


def caused(cause: Exception) -> Exception:
    error = ValueError("backend compiler failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            True,
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("unable to mmap 8 bytes from file <model.safetensors>: Cannot allocate memory (12)"), True),
        (OSError("The paging file is too small for this operation to complete. (os error 1455)"), True),
        (RuntimeError("Couldn't open file mapping: <model.safetensors>, error code: <1455>"), True),
        (OSError("The system cannot find the file specified. (os error 2)"), False),
        (caused(torch.OutOfMemoryError("CUDA out of memory")), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
        (caused(ValueError("no")), False),
    ],
    ids=str,
)
def test_names(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_allocator_that_really_fails_is_recognised() -> None:
    found = attempt(lambda: torch.empty(2**50), CPU)
    assert isinstance(found, Shortage)
    assert "tried to allocate" in found.evidence
    assert found.held_bytes["process"] > 2**20


def test_what_was_begun_is_let_go() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        begun = torch.zeros(1000)
        kept.append(weakref.ref(begun))
        begun.expand(2**45, 1000).clone()

    gc.disable()
    try:
        assert isinstance(attempt(fail, CPU), Shortage)
    finally:
        gc.enable()
    assert kept[0]() is None


def test_other_errors_pass() -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        attempt(fail, CPU)
    assert attempt(lambda: 3, CPU) == 3
