"""What the settings of the recipe a6000-pretrain are worth, one after the other, as on the page docs/a6000-pretrain.md.

Tokens per second are the median of the steps after the first ones; the ratio is against the first row of the same run.

    python benchmarks/a6000.py path/to/text                                     # a GPU: the recipe's own shape
    python benchmarks/a6000.py path/to/text --length 64 --steps 5 --warmup 1    # a CPU: shorter blocks
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import RESULTS, save_result
from steady import ALONE, describe, measure_run

import onecard

# Each row takes the old way back by one setting more.
OLD_WAY: dict[str, dict[str, Any]] = {
    "mixed precision": {"precision": "fp32"},
    "batch 32 x 4": {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 10},
    "background loading": {"dataloader_num_workers": 0},
    "compiled": {"torch_compile": False},
    "the recipe: Muon": {"optim": "adamw"},
}


def rows(changes: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings of all rows, from the old way to the recipe. `changes` hold in every row."""
    kept = [{"torch_compile": True}, *OLD_WAY.values()]
    for index, name in enumerate(["before", *OLD_WAY]):
        settings: dict[str, Any] = {}
        for setting in (kept[0], *kept[index + 1 :]):
            settings |= setting
        yield name, settings | changes


def load(texts: list[Path], size: str, changes: dict[str, Any]) -> onecard.spec.Recipe:
    """The recipe on the given text, with a row's settings."""
    dataset = [{"path": str(text)} for text in texts]
    return onecard.load_recipe("a6000-pretrain", dataset=dataset, size=size, **ALONE, **changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--size", default="small", choices=("small", "medium", "large"))
    parser.add_argument("--length", type=int, default=1024, help="tokens per block")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, help="steps that are not counted; default a third")
    arguments = parser.parse_args()
    num_warmup = arguments.steps // 3 if arguments.warmup is None else arguments.warmup
    result: dict[str, Any] = {}
    for name, settings in rows({"max_steps": arguments.steps, "max_seq_length": arguments.length}):
        row = measure_run(load(arguments.text, arguments.size, settings), num_warmup)
        first = next(iter(result.values()), row)
        result[name] = {**row, "ratio": row["tokens_per_s"] / first["tokens_per_s"]}
        print(f"{name:20} {result[name]['ratio']:.2f} x  {describe(row)}", flush=True)
        save_result(RESULTS / "a6000.json", {"size": arguments.size, "rows": result})


if __name__ == "__main__":
    main()
