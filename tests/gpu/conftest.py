"""The same tests on the CPU, which is always there, and on a GPU where there is one."""

import os

import pytest

# cuBLAS reads it once per process, before its first product; `deterministic: true` needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn."""
    return str(request.param)
