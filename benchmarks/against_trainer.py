"""Steady-state tokens/s on this device against Hugging Face's Trainer: same model, batch, data type and optimizer.

Each side trains the same architecture from the same weights; the first steps, and with them any compiling, are not
counted. The sides run in turn, several times, and the ratio is taken round by round. Trainer runs the model as
transformers builds it, with fused AdamW, no padding, no evaluation, no saving, logging once at the end. In fp32 both
are also compiled: `onecard` compiles a long run by itself, Trainer where it is told to. `--only fp32` measures cases of
that name; others measured with the same source are kept in the result.

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
from record import earlier_result, write_result

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
    parser.add_argument("--only", default="", help="part of the name of a case: bf16, fp32, gpt2, qwen3")
    arguments = parser.parse_args()
    result = earlier_result("against_trainer")
    for (shape_name, shape), precision in itertools.product(SHAPES.items(), ("bf16", "fp32")):
        name = f"{shape_name}, {precision}"
        if arguments.only not in name:
            continue
        recipe = make_recipe(arguments.text, {**shape, "precision": precision})
        rounds = [measure_round(recipe, with_compiled=precision == "fp32") for _ in range(arguments.repeats)]
        ratios = {
            f"{ours} / {theirs}": [speeds[ours] / speeds[theirs] for speeds in rounds]
            for ours, theirs in itertools.product(("onecard", "onecard compiled"), ("Trainer", "Trainer compiled"))
            if ours in rounds[0] and theirs in rounds[0]
        }
        result[name] = {"rounds": rounds, "ratios": {k: statistics.median(v) for k, v in ratios.items()}}
        for label, values in ratios.items():
            print(f"{name}: {label} {statistics.median(values):.2f} x ({[round(value, 2) for value in values]})")
        write_result("against_trainer", result)


def measure_round(recipe: onecard.spec.Recipe, *, with_compiled: bool) -> dict[str, float]:
    """Tokens/s of every side, one after the other."""
    speeds = {}
    for is_compiled in (False, True) if with_compiled else (False,):
        suffix = " compiled" if is_compiled else ""
        recipe = recipe.model_copy(update={"torch_compile": is_compiled})
        for side, run in (("onecard", run_onecard), ("Trainer", run_trainer)):
            torch._dynamo.reset()  # each run compiles for itself, as it would in a process of its own
            speeds[side + suffix] = run(recipe)
    return speeds


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
    ours = assemble(onecard.plan(recipe.model_copy(update={"precision": "fp32"}))).model
    model = transformers.AutoModelForCausalLM.from_config(ours.config, attn_implementation="sdpa", dtype=torch.float32)
    model.load_state_dict(ours.state_dict())
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
            torch_compile=recipe.torch_compile is True,
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(model=model, args=arguments, train_dataset=Blocks(), callbacks=[clock]).train()
    return COUNTED * 12 * 64 / (clock.times[-1] - clock.times[WARMUP - 1])


if __name__ == "__main__":
    main()
