"""Where results go: one JSON file per benchmark, with what is needed to repeat it."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes a result beside machine, versions, date, commit and command; returns the file."""
    RESULTS.mkdir(exist_ok=True)
    path = save_result(RESULTS / f"{name}.json", result)
    print(f"written to {path}")
    return path


def earlier_result(name: str) -> dict[str, Any]:
    """The result that is there already, where `src` is still what it was measured with; else an empty one."""
    try:
        document = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    unchanged = ["git", "diff", "--quiet", document["commit"], "--", "src"]
    is_same = subprocess.run(unchanged, cwd=RESULTS.parents[1], check=False).returncode == 0
    return document["result"] if is_same else {}


def save_result(path: Path, result: dict[str, Any]) -> Path:
    """Writes what `write_result` writes to a file of any place, in silence, replacing it whole."""
    # File names only: where things lie on this machine helps nobody.
    command = " ".join(["python", *(Path(word).name if "/" in word else word for word in sys.argv)])
    document = {"command": command, **describe_machine(), "result": result}
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def read_rows(path: Path) -> dict[str, Any]:
    """Rows of an earlier call on the same machine; rows that could not be run are tried again."""
    if not path.exists():
        return {}
    document, here = json.loads(path.read_text(encoding="utf-8")), describe_machine()
    for key in ("device", "versions"):
        if document[key] != here[key]:
            sys.exit(f"{path} is of {document[key]}, and this is {here[key]}: move it away first")
    return {name: row for name, row in document["result"]["rows"].items() if "error" not in row}


def describe_machine() -> dict[str, Any]:
    """Device, versions, date and commit of this run."""
    import torch

    from onecard.hardware import probe_machine

    machine = probe_machine()
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {machine.num_cores} cores, {_cpu()}"
    return {
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent
        ).stdout.strip(),
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "AMX" if "amx_bf16" in flags else "AVX-512" if "avx512f" in flags else "AVX2"
