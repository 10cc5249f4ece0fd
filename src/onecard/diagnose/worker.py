"""Runs tests of the machine in a process of its own, which may hang or die: `python -m onecard.diagnose.worker NAME`.

Each outcome is one line of JSON on stdout, told as soon as it is there.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from onecard.diagnose.check import Check
from onecard.diagnose.machine_tests import TESTS, Entry
from onecard.hardware import probe_machine


def main(names: Sequence[str], tests: Mapping[str, Entry] = TESTS) -> None:
    """Runs the named tests in their order."""
    # Libraries print: what they say must not stand between the lines.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    machine = probe_machine()
    for name in names:
        try:
            check = tests[name].run(machine)
        except Exception as error:  # whatever it is, it belongs to this test alone
            check = _failed(name, error)
        print(json.dumps(asdict(check)), file=answers, flush=True)


def _failed(name: str, error: Exception) -> Check:
    lines = str(error).strip().splitlines()
    found = f"failed: {type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
    remedy = "install onecard's requirements anew, in its clone: pip install -c constraints.txt -e ."
    return Check(name, "bad", found, remedy)


if __name__ == "__main__":
    main(sys.argv[1:])
