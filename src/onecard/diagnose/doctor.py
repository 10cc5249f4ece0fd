"""Tests this machine: every test is bounded in time, and none can end another."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from queue import Empty, Queue

import psutil

from onecard.diagnose.check import Check
from onecard.diagnose.host import check_console
from onecard.diagnose.machine_tests import TESTS, Entry

# Programs that want a core, for each there is: a test then gets so small a share that its silence tells little.
_CROWDED = 3
_WORKER = (sys.executable, "-m", "onecard.diagnose.worker")


def examine(
    encoding: str | None, tests: Mapping[str, Entry] = TESTS, worker: Sequence[str] = _WORKER
) -> Iterator[Check]:
    """Yields outcomes as they come. `encoding` is that of the console, which only the caller knows.

    One process runs the tests after another; where it hangs or dies, the test it was at is told as bad, and a new
    process goes on with those after it.
    """
    yield check_console(encoding)
    left = list(tests)
    while left:
        for check in _run(tuple(left), tests, worker):
            left.pop(0)
            yield check


def _run(names: Sequence[str], tests: Mapping[str, Entry], worker: Sequence[str]) -> Iterator[Check]:
    """Runs tests in one process until all are done or one of them ends it; that one is the last that is yielded."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*worker, *names], stdout=subprocess.PIPE, stderr=said, stdin=subprocess.DEVNULL)
        lines: Queue[bytes | None] = Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        try:
            for name in names:
                try:
                    line = lines.get(timeout=tests[name].limit_s)
                except Empty:
                    yield _hung(name, tests[name])
                    return
                if line is None:
                    said.seek(0)
                    yield _died(name, process.wait(), said.read(), tests[name].remedy)
                    return
                yield Check(**json.loads(line))
        finally:
            process.kill()
            process.wait()
            reader.join()
            if process.stdout is not None:
                process.stdout.close()


def _read(process: "subprocess.Popen[bytes]", lines: "Queue[bytes | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _hung(name: str, test: Entry) -> Check:
    silence = f"no answer after {test.limit_s:.0f} s"
    waiting = psutil.getloadavg()[0] / (psutil.cpu_count() or 1)
    if waiting > _CROWDED:
        found = f"{silence}, while {waiting:.0f} programs wait for each core, which may be why"
        return Check(name, "warning", found, "end other programs, then run onecard doctor again")
    return Check(name, "bad", f"hangs: {silence}", test.remedy)


def _died(name: str, code: int, said: bytes, remedy: str) -> Check:
    text = said.decode("utf-8", errors="replace").strip().splitlines()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = f": {text[-1][:200]}" if text else ""
    return Check(name, "bad", f"ended the process ({how}){last}", remedy)
