"""What nanoGPT's published CPU budget is worth: 2,000 steps of 12 x 64 characters of tiny Shakespeare.

Two runs per seed over the same tokens: the GPT-2 shape with AdamW at a better rate than nanoGPT's, and the default
architecture and optimizer (recipe shakespeare-char-cpu, which has no more parameters). The loss is exact, over all
non-overlapping blocks of 64 of the last tenth of the text. nanoGPT's README gives 1.88 for its setting.

    python benchmarks/shakespeare.py path/to/tinyshakespeare.txt --seeds 1337 1338 1339
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from record import write_result

import onecard

BUDGET = {"max_steps": 2000, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1, "max_seq_length": 64}
GPT2 = {
    "model_config": {"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128},
    "dropout": 0.0,
    "init": "transformers",
    "optim": "adamw",
    "adam_beta2": 0.99,
    "warmup_steps": 100,
    "lr_scheduler_type": "cosine",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "GPT-2, AdamW 4e-3": {**GPT2, "learning_rate": 4e-3, "min_lr_ratio": 0.0},
    "default": {},
}
PLAIN = {
    "name": "shakespeare",
    "tokenizer": "char",
    "eval_fraction": 0.1,
    "eval_split": "tail",
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--only", help="part of the name of one setting")
    arguments = parser.parse_args()
    result = {}
    for name, setting in SETTINGS.items():
        if arguments.only is None or arguments.only in name:
            runs = [train(arguments.text, setting, seed) for seed in arguments.seeds]
            losses = [run["loss"] for run in runs]
            result[name] = {"runs": runs, "mean": statistics.mean(losses), "spread": max(losses) - min(losses)}
            print(f"{name:40} {statistics.mean(losses):.4f}  spread {result[name]['spread']:.4f}")
    write_result("shakespeare" if arguments.only is None else f"shakespeare-{arguments.only}", result)


def train(text: Path, setting: dict[str, Any], seed: int) -> dict[str, float]:
    """Trains one setting and gives its final held-out loss."""
    budget = {key: value for key, value in BUDGET.items() if key not in setting}
    common = {**budget, "dataset": str(text), "seed": seed, "report_to": "none", "eval_steps": 0, "sample_prompts": []}
    source: Any = {**PLAIN, **setting} if setting else "shakespeare-char-cpu"
    recipe = onecard.load_recipe(source, **common)
    events = []
    with tempfile.TemporaryDirectory() as folder:
        onecard.train(recipe, output_dir=Path(folder) / "run", on_event=events.append)
        plan = onecard.plan(recipe)
    steps = [event for event in events if event.event == "step"]
    finished = events[-1]
    return {
        "seed": seed,
        "loss": finished.loss,
        "parameters": plan.model.num_parameters,
        "training_s": sum(event.step_s for event in steps),
    }


if __name__ == "__main__":
    main()
