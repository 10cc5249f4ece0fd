"""A report at the end of a run, however it ends."""

import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from onecard.errors import OnecardError
from onecard.hardware import Machine
from onecard.report.record import read_runs
from onecard.report.words import system_language
from onecard.report.write import write_report
from onecard.run.folder import RunFolder

log = logging.getLogger("onecard.run")

_PACKAGES = ("onecard", "torch", "transformers", "peft", "tokenizers", "bitsandbytes")


@contextmanager
def reported(folder: RunFolder, machine: Machine) -> Iterator[None]:
    """Writes down with what a run is made, and its report when the block ends, also where it fails.

    A report that cannot be written is a warning: the run itself is worth more.
    """
    try:
        (folder.root / "environment.json").write_text(
            json.dumps(describe_environment(machine), indent=1), encoding="utf-8"
        )
    except OSError as error:
        log.warning("%s: the versions of this run are not kept", error)
    try:
        yield
    finally:
        try:
            if folder.has_record():
                write_report(read_runs([folder.root])[0], system_language())
        except (OSError, OnecardError) as error:
            log.warning("no report was written: %s. `onecard report %s` tries again", error, folder.root)


def describe_environment(machine: Machine) -> dict[str, str]:
    """Versions and hardware by name, without paths and names of machines."""
    found = {package: text for package in _PACKAGES if (text := _version(package))}
    found["python"] = machine.python
    found["system"] = f"{platform.system()} {platform.release()} ({machine.platform})"
    found["processor"] = f"{platform.processor() or platform.machine()}, {machine.num_cores} cores"
    if machine.gpus:
        found["GPU"] = ", ".join(gpu.name for gpu in machine.gpus)
        found["driver"] = machine.driver or "unknown"
    if setting := os.environ.get("CUDA_VISIBLE_DEVICES"):
        found["CUDA_VISIBLE_DEVICES"] = setting
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source" if package == "onecard" else None
