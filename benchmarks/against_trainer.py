"""Steady-state tokens/s on this device against Hugging Face's Trainer: same model, batch, data type and optimizer.

Each side trains the same transformers model on the same tokens; the first steps are not counted. The two run in turn,
several times, and the ratio is taken pair by pair. Trainer runs at its best: fused AdamW, no padding, no evaluation, no
saving, logging once at the end.

    python benchmarks/against_trainer.py path/to/tinyshakespeare.txt
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_result

import onecard
from onecard.training.assemble import assemble

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2 0.8M, 12 x 64": {"model_config": {"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128}},
    "qwen3 0.7M, 12 x 64": {
        "model_config": {"model_type": "qwen3", "head_dim": 32},
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 336,
    },
}
WARMUP, COUNTED = 30, 170


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    result = {}
    for (shape_name, shape), precision in itertools.product(SHAPES.items(), ("bf16", "fp32")):
        name = f"{shape_name}, {precision}"
        pairs = []
        for _ in range(arguments.repeats):
            recipe = make_recipe(arguments.text, {**shape, "precision": precision})
            ours, theirs = run_onecard(recipe), run_trainer(recipe)
            pairs.append({"onecard": ours, "trainer": theirs, "ratio": ours / theirs})
        ratio = statistics.median(pair["ratio"] for pair in pairs)
        result[name] = {"pairs": pairs, "ratio": ratio}
        print(f"{name}: {ratio:.2f} x Trainer ({[round(pair['ratio'], 2) for pair in pairs]})")
    write_result("against_trainer", result)


def make_recipe(text: Path, shape: dict[str, Any]) -> onecard.spec.Recipe:
    settings = {
        "name": "bench",
        "tokenizer": "char",
        "eval_fraction": 0.1,
        "max_seq_length": 64,
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 1,
        "max_steps": WARMUP + COUNTED,
        "optim": "adamw",
        "learning_rate": 1e-3,
        "torch_compile": False,
        "init": "transformers",
        "tie_word_embeddings": True,
        "report_to": "none",
        "save_steps": 0,
        "eval_steps": 0,
    }
    return onecard.load_recipe({**settings, **shape, "dataset": str(text)})


def run_onecard(recipe: onecard.spec.Recipe) -> float:
    """Tokens/s of a whole `onecard.train`, from its own record."""
    steps: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        onecard.train(
            recipe,
            output_dir=Path(folder) / "run",
            on_event=lambda event: steps.append((time.perf_counter(), event)) if event.event == "step" else None,
        )
    first, last = steps[WARMUP - 1], steps[-1]
    return (last[1].tokens_seen - first[1].tokens_seen) / (last[0] - first[0])


def run_trainer(recipe: onecard.spec.Recipe) -> float:
    """Tokens/s of Trainer over the same number of steps."""
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments

    transformers.logging.set_verbosity_error()
    is_bf16 = recipe.precision == "bf16"
    # Trainer keeps fp32 weights and casts by autocast.
    model = assemble(onecard.plan(recipe.model_copy(update={"precision": "fp32"}))).model
    model.set_attn_implementation("sdpa")
    tokens = np.memmap(onecard.prepare(recipe).train[0].path, dtype=np.uint16, mode="r")

    class Blocks(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(tokens) // 64

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(tokens[index * 64 : index * 64 + 64].astype(np.int64))
            return {"input_ids": ids, "labels": ids}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=12,
            max_steps=WARMUP + COUNTED,
            learning_rate=1e-3,
            optim="adamw_torch_fused",
            logging_steps=10_000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=is_bf16,
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(model=model, args=arguments, train_dataset=Blocks(), callbacks=[clock]).train()
    return COUNTED * 12 * 64 / (clock.times[-1] - clock.times[WARMUP - 1])


if __name__ == "__main__":
    main()
