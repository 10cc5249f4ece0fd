"""What is kept of a measurement: scores, what was written, and whose weights they belong to."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import torch

from onecard.evaluation.task import Result
from onecard.model.weight_files import fingerprint
from onecard.run.marks import write_result
from onecard.run.versions import onecard_version, package_version
from onecard.spec import CheckpointScores
from onecard.spec.score import Protocol

SCORES = "scores.jsonl"
_ITEMS = "items"


def protocol_of(folder: Path, dtype: torch.dtype, device: str) -> Protocol:
    """Says whose weights are measured, in which precision, on what and by which versions."""
    return {
        "weights": fingerprint_of(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "onecard": onecard_version(),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
    }


def fingerprint_of(folder: Path) -> str:
    """Tells the weights of a model folder, or of an adapter's, from any others: 16 hex digits."""
    adapter = folder / "adapter_model.safetensors"
    if (folder / "adapter_config.json").is_file() and adapter.is_file():
        return hashlib.sha256(adapter.read_bytes()).hexdigest()[:16]
    return fingerprint(folder)


def record_scores(root: Path, row: CheckpointScores) -> None:
    """Appends the scores of a checkpoint to the record of its run."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (root / SCORES).open("a", encoding="utf-8", newline="\n") as file:
        for score in row.scores:
            line = {"time": now, "checkpoint": row.name, "step": row.step} | score.model_dump(mode="json")
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def keep_responses(root: Path, name: str, result: Result) -> None:
    """Keeps what a model wrote, so that it can be read, and scored again with --responses."""
    if not result.rows:
        return
    folder = root / "responses"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for entry in result.rows:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def keep_items(root: Path, task: str, checkpoint: str, result: Result) -> None:
    """Keeps what a model made of each item beside the scores that are made of them, so that runs can be compared.

    Results of another protocol (`--limit`, `--text`) lie beside them.
    """
    protocol = {key: value for key, value in result.scores[0].protocol.items() if key != "weights"}
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode("utf-8")).hexdigest()[:8]
    write_result(root / _ITEMS / f"{task}-{digest}-{checkpoint}.json", result)
