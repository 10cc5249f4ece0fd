"""The same run on 1, 2 and 4 processes: how far losses differ, over 50 steps in fp32, gloo on this machine.

    python benchmarks/ranks.py [--num_steps 50] [--ranks 2,4] [--folder PLACE]

Text and chats of unequal length, full and LoRA, DDP and FSDP2. Chats and the model they start from are made here; the
text is Python's standard library. `cut finer` is one process with micro-batches of half the size: the same samples,
sums in another order, and so what rounding alone does. Speeds are told, but on fewer cores than processes they say
nothing.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import write_result

import onecard
from onecard.data import train_tokenizer
from onecard.model.build import build_model
from onecard.model.folder import save_model_folder

_SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
_SHAPE = {"model_type": "llama", "intermediate_size": 256, "max_position_embeddings": 256, **_SIZES}
_WORDS = ("sun", "moon", "star", "sea", "wind", "tree", "bird", "stone", "gold", "pale", "salt", "cold", "grey", "wide")
_COMMON: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "torch_compile": False,
    "optim": "adamw",
    "total_batch_size": 8,
    "per_device_train_batch_size": 2,
    "eval_steps": 0,
    "save_steps": 0,
    "report_to": "none",
}


def make_cases(folder: Path, num_steps: int) -> dict[str, dict[str, Any]]:
    """The recipes, by name; they hold for any number of processes."""
    text = _COMMON | {"max_steps": num_steps, "dataset": "python-stdlib", "tokenizer": "bytes", "max_seq_length": 64}
    text |= _SIZES | {"model_config": {"model_type": "llama", "intermediate_size": 256}, "learning_rate": 3e-4}
    muon = text | {"optim": "muon", "learning_rate": 6e-3}
    chats = _COMMON | {"max_steps": num_steps, "task": "sft", "dataset": str(_write_chats(folder))}
    # Packed they fill fewer rows than there are chats: with 8, four processes would have three micro-batches of 2.
    chats |= {"total_batch_size": 16, "max_seq_length": 128, "eval_fraction": 0.05}
    chats |= {"model_name_or_path": str(_write_base(folder))}
    return {
        "text, full": text,
        "text, full, Muon": muon,
        # Towards what AdamW bears here, and above it: differences of rounding grow from step to step.
        "text, full, rate 1e-3": text | {"learning_rate": 1e-3},
        "text, full, rate 6e-3": text | {"learning_rate": 6e-3},
        "text, full, FSDP2": text | {"strategy": "fsdp"},
        "text, full, FSDP2, Muon": muon | {"strategy": "fsdp"},
        "chats, full": chats,
        "chats, full, FSDP2": chats | {"strategy": "fsdp"},
        "chats, LoRA": chats | {"method": "lora", "lora_r": 8, "learning_rate": 1e-3},
    }


def _write_chats(folder: Path) -> Path:
    """Chats of 1 to 4 rounds, whose answers have 1 to 60 words."""
    draw, path = random.Random(7), folder / "chats.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(400):
            turns = []
            for _ in range(draw.randint(1, 4)):
                turns.append({"role": "user", "content": f"What is {' '.join(draw.choices(_WORDS, k=3))}?"})
                answer = " ".join(draw.choices(_WORDS, k=draw.choice((1, 3, 8, 20, 60))))
                turns.append({"role": "assistant", "content": answer})
            lines.write(json.dumps({"messages": turns}) + "\n")
    return path


def _write_base(folder: Path) -> Path:
    tokenizer = train_tokenizer("bpe", [" ".join(_WORDS) * 40], 300)
    ends = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    settings = _SHAPE | ends | {"vocab_size": len(tokenizer)}
    save_model_folder(build_model(settings, dropout=0.0, init="transformers", seed=3), {}, folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def train_all(recipes: dict[str, dict[str, Any]]) -> None:
    """What each process does: one recipe after the other, into the folders that name them."""
    for root, values in recipes.items():
        onecard.train(onecard.load_recipe(values), output_dir=root)


def read_steps(root: Path) -> list[dict[str, Any]]:
    lines = (root / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_steps", type=int, default=50)
    parser.add_argument("--ranks", default="2,4", help="numbers to compare with one process")
    parser.add_argument("--folder", type=Path, help="where runs are kept; those that are done there are not made again")
    parser.add_argument("--recipes", type=Path, help="of a process that torchrun has started")
    asked = parser.parse_args()
    if asked.recipes is not None:
        train_all(json.loads(asked.recipes.read_text(encoding="utf-8")))
        return
    with tempfile.TemporaryDirectory() as place:
        rows = train_each_way(asked.folder or Path(place), asked.num_steps, asked.ranks.split(","))
    write_result("ranks", {"num_steps": asked.num_steps, "rows": rows})


def train_each_way(folder: Path, num_steps: int, numbers: list[str]) -> dict[str, Any]:
    """Trains all recipes alone, cut finer, and on each number of processes; what is done in the folder is kept."""
    cases = make_cases(folder, num_steps)
    finer = {"cut finer": (1, {"per_device_train_batch_size": 1})}
    ways = {"1 rank": (1, {}), **finer, **{f"{num} ranks": (int(num), {}) for num in numbers}}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in cases}
    for way, (num, changes) in ways.items():
        roots = {name: folder / f"{way}-{index}" for index, name in enumerate(cases)}
        missing = {name: root for name, root in roots.items() if not is_done(root, num_steps)}
        for root in missing.values():
            shutil.rmtree(root, ignore_errors=True)
        listed = folder / f"{way}.json"
        listed.write_text(json.dumps({str(root): cases[name] | changes for name, root in missing.items()}))
        if missing:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num}"]
            subprocess.run([*torchrun, __file__, "--recipes", str(listed)], check=True)
        for name, root in roots.items():
            runs[name][way] = read_steps(root)
            print(way, name, compare(runs[name])[way], flush=True)
    return {name: compare(found) for name, found in runs.items()}


def is_done(root: Path, num_steps: int) -> bool:
    """Whether a run is there and has come to its end."""
    return (root / "checkpoints" / f"step-{num_steps:06}").exists()


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """How far each way of training is from the first, and how fast it was."""
    alone = [step["loss"] for step in next(iter(runs.values()))]
    row: dict[str, Any] = {"num_steps": len(alone), "first_loss": alone[0], "last_loss": alone[-1]}
    for way, run in runs.items():
        losses = [step["loss"] for step in run]
        assert len(losses) == len(alone)
        row[way] = {
            "largest_difference": max(abs(one - other) for one, other in zip(losses, alone, strict=True)),
            "tokens_per_s": round(statistics.median(step["tokens_per_s"] for step in run)),
        }
    return row


if __name__ == "__main__":
    main()
