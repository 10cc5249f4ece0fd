"""Tests this machine: every test is bounded in time, and none can end another."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from queue import Empty, Queue

from onecard.diagnose.check import Check
from onecard.diagnose.host import check_console
from onecard.diagnose.machine_tests import TESTS, Entry

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
                    yield Check(name, "bad", f"hangs: no answer after {tests[name].limit_s:.0f} s", tests[name].remedy)
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


def _died(name: str, code: int, said: bytes, remedy: str) -> Check:
    text = said.decode("utf-8", errors="replace").strip().splitlines()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = f": {text[-1][:200]}" if text else ""
    return Check(name, "bad", f"ended the process ({how}){last}", remedy)
