"""What onecard does on this GPU: two recipes, choices on the shape of one, and the rows of docs/a6000-pretrain.md.

Every row is a whole run, written to benchmarks/results/gpu.json as soon as it is done; rows that are there are not
measured again, so the same command goes on where it was cut short. The first text is also the one of characters.

    python benchmarks/gpu.py tinyshakespeare.txt more/text              # everything, half an hour on a large card
    python benchmarks/gpu.py tinyshakespeare.txt --minutes 9            # begins no row after so many minutes
    python benchmarks/gpu.py tinyshakespeare.txt --only "a6000 small"   # rows whose name holds this
    python benchmarks/gpu.py tinyshakespeare.txt --tiny                 # a dry run, on a CPU too; nothing is kept
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import a6000
import torch
from record import RESULTS, describe_machine, read_rows, save_result
from steady import ALONE, describe, measure_run

import onecard
from onecard.errors import OnecardError

TINY: dict[str, Any] = {
    "max_steps": 3,
    "warmup_steps": 1,
    "max_seq_length": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TINY_WORDS: dict[str, Any] = {"vocab_size": 512, "num_key_value_heads": 1, "intermediate_size": 64}


@dataclass(frozen=True)
class Row:
    """One run: a shipped recipe with changes, of whose steps the first `num_warmup` are not counted."""

    name: str
    recipe: str
    changes: dict[str, Any]
    num_warmup: int

    def load(self, texts: list[Path], *, is_tiny: bool) -> onecard.spec.Recipe:
        """The recipe of this row; its text unless the row has its own."""
        dataset = [{"path": str(text)} for text in (texts[:1] if "char" in self.recipe else texts)]
        changes: dict[str, Any] = {"dataset": dataset, **ALONE, **self.changes}
        if is_tiny:
            changes |= TINY if "char" in self.recipe else TINY | TINY_WORDS
        return onecard.load_recipe(self.recipe, **changes)


def all_rows(num_steps: int) -> Iterator[Row]:
    """Every row, in the order of what one wants to know first."""
    # Compiled, as the planner would for all of its steps.
    some = {"warmup_steps": 20, "max_steps": 300, "torch_compile": True, "eval_fraction": 0.05, "eval_batches": 50}
    yield Row("rtx-5060-pretrain", "rtx-5060-pretrain", some, 50)
    yield Row("shakespeare-char", "shakespeare-char", {"eval_fraction": 0.1}, 100)
    choices = itertools.product(("eager", "compiled"), ("adamw", "muon"), ("sdpa", "varlen"), (True, False))
    # Without dropout, which varlen does not know.
    shape = {"warmup_steps": 10, "max_steps": num_steps, "dropout": 0.0}
    for mode, optimizer, attention, recomputes in choices:
        settings = {
            "torch_compile": mode == "compiled",
            "optim": optimizer,
            "attn_implementation": attention,
            "gradient_checkpointing": recomputes,
        }
        name = f"sweep: {mode}, {optimizer}, {attention}, {'recomputed' if recomputes else 'kept'}"
        yield Row(name, "rtx-5060-pretrain", shape | settings, num_steps // 3)
    # Many short files, so that every row of a batch has borders and sdpa needs a mask.
    for mode, attention in itertools.product(("eager", "compiled"), ("sdpa", "varlen")):
        settings = {"torch_compile": mode == "compiled", "attn_implementation": attention, "dataset": "python-stdlib"}
        yield Row(f"documents: {mode}, {attention}", "rtx-5060-pretrain", shape | settings, num_steps // 3)
    for size in ("small", "medium"):
        for name, settings in a6000.rows({"max_steps": num_steps, "size": size}):
            yield Row(f"a6000 {size}: {name}", "a6000-pretrain", settings, num_steps // 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--only", default="", help="part of the names of the rows to measure")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--steps", type=int, default=60, help="steps of each row but the first two")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there already")
    parser.add_argument(
        "--tiny", action="store_true", help="scaled shapes, three steps, written to the temporary folder"
    )
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        parser.error("no GPU here; --tiny makes a dry run of every row on a CPU")
    path = Path(tempfile.gettempdir()) / "gpu-tiny.json" if arguments.tiny else RESULTS / "gpu.json"
    done = read_rows(path)
    deadline = time.monotonic() + 60 * arguments.minutes
    chosen = [row for row in all_rows(arguments.steps) if arguments.only in row.name]
    due = [row for row in chosen if arguments.again or row.name not in done]
    for index, row in enumerate(due):
        if time.monotonic() > deadline:
            print(f"{len(due) - index} rows are left: the same command goes on with them")
            return
        done[row.name] = measure(row, arguments.text, is_tiny=arguments.tiny)
        save_result(path, {"rows": with_ratios(done)})
        print(f"{row.name:44} {tell(done[row.name])}", flush=True)
    print(f"all {len(chosen)} rows are in {path}")


def measure(row: Row, texts: list[Path], *, is_tiny: bool) -> dict[str, Any]:
    """Runs one row; one that cannot be run says why."""
    found: dict[str, Any] = {"commit": describe_machine()["commit"], "recipe": row.recipe, "changes": row.changes}
    try:
        return found | measure_run(row.load(texts, is_tiny=is_tiny), 1 if is_tiny else row.num_warmup)
    except (OnecardError, torch.OutOfMemoryError) as error:
        return found | {"error": str(error)}


def tell(row: dict[str, Any]) -> str:
    return f"not run: {row['error'].splitlines()[0]}" if "error" in row else describe(row)


def with_ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """Adds to the rows of a6000-pretrain how they stand against the first of their size."""
    for name, row in rows.items():
        size, _, _ = name.partition(":")
        first = rows.get(f"{size}: before", {})
        if "tokens_per_s" in first and "tokens_per_s" in row:
            row["ratio"] = row["tokens_per_s"] / first["tokens_per_s"]
    return rows


if __name__ == "__main__":
    main()
