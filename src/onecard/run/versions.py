"""With what a run was made: at its start, and again where it went on with something else."""

import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onecard.hardware import probe_machine
from onecard.report.record import VERSIONS, read_versions
from onecard.spec.moving import move

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")


def find_versions() -> dict[str, str]:
    """Gives Python, onecard and what it computes with, the platform and the hardware of this process."""
    machine = probe_machine()
    found = {"python": platform.python_version(), "onecard": onecard_version()}
    found |= {name: package_version(name) for name in _PACKAGES} | {"platform": platform.platform()}
    found["processor"] = f"{platform.processor() or platform.machine()}, {machine.num_cores} cores"
    if machine.gpus:
        found["GPU"] = ", ".join(gpu.name for gpu in machine.gpus)
        found["driver"] = machine.driver or "unknown"
    return found


def record_versions(root: Path, step: int) -> None:
    """Appends what a run goes on with after `step` to its versions.jsonl, where that is not what it had until then.

    What was written for steps after it belongs to a record that is cut off.
    """
    path = root / VERSIONS
    lines = [line for line in read_versions(root) if step and line.step < step]
    rows = [{"step": line.step, "versions": line.versions} for line in lines]
    if not lines or lines[-1].versions != find_versions():
        rows.append({"step": step, "versions": find_versions()})
    beside = path.with_name(f".{path.name}")
    beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    move(beside, path)


@cache
def package_version(package: str) -> str:
    """The version of a package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def onecard_version() -> str:
    """The version of onecard; in a clone with its commit, as in 0.1.0+gfa2c1b90d, and `-dirty` where files differ."""
    try:
        number = version("onecard")
    except PackageNotFoundError:  # run from the source tree
        number = "source"
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return number
    # Of a clone the version alone says little: it stays the same over hundreds of commits.
    describe = ["describe", "--always", "--exclude=*", "--abbrev=9", "--dirty"]
    command = ["git", "--no-optional-locks", "-C", str(root), *describe]
    try:
        found = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git
        return number
    return f"{number}+g{found.stdout.strip()}" if found.returncode == 0 else number
