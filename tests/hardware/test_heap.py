"""What freed memory of a process does."""

import subprocess
import sys

import pytest

from onecard.hardware import keep_freed_memory

_PROGRAM = """
import resource, sys
from onecard.hardware.heap import give_back_freed_memory, keep_freed_memory

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"1" * 2**27
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_block()
print(faults_of_a_block())
assert keep_freed_memory()
faults_of_a_block()
print(faults_of_a_block())
give_back_freed_memory()
print(faults_of_a_block())
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    run = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    anew, kept, given_back = map(int, run.stdout.split())
    assert kept < 0.01 * anew
    assert given_back > 0.5 * anew


def test_another_system_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert not keep_freed_memory()
