"""Steady-state tokens/s on this device against Hugging Face's Trainer: same model, batch, data type and optimizer.

Each side trains the same architecture from the same weights; the first steps, and with them any compiling, are not
counted. The sides run in turn, several times, and the ratio is taken round by round. Trainer runs the model as
transformers builds it, with fused AdamW, no padding, no evaluation, no saving, logging once at the end. In fp32 the
small shapes are also compiled: `onecard` compiles a long run by itself, Trainer where it is told to. Of the large ones
`auto` is what onecard chooses for a run of 5,000 steps, against the faster of Trainer's two types. Start-up is the time
from the call to the end of the first step. `--only 11M` measures cases of that name; others measured with the same
source are kept in the result.

    python benchmarks/against_trainer.py path/to/tinyshakespeare.txt
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import earlier_result, write_result

import onecard
from onecard.training.assemble import assemble


@dataclass(frozen=True)
class Shape:
    """A model, what a step computes, and how many steps run before those that count."""

    settings: dict[str, Any]
    batch_size: int
    length: int
    num_warmup: int
    num_counted: int
    is_large: bool = False


SMALL: dict[str, Any] = {"batch_size": 12, "length": 64, "num_warmup": 30, "num_counted": 170}
SHAPES: dict[str, Shape] = {
    "gpt2 0.8M, 12 x 64": Shape(
        {"model_config": {"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128}}, **SMALL
    ),
    "qwen3 0.7M, 12 x 64": Shape(
        {
            "model_config": {"model_type": "qwen3", "head_dim": 32},
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 336,
        },
        **SMALL,
    ),
    # shakespeare-char, with a quarter of its batch in a step.
    "gpt2 11M, 16 x 256": Shape(
        {"model_config": {"model_type": "gpt2", "n_layer": 6, "n_head": 6, "n_embd": 384}},
        16,
        256,
        3,
        12,
        is_large=True,
    ),
    # rtx-5060-pretrain with its whole vocabulary; the text uses little of it.
    "qwen3 75M, 4 x 512": Shape(
        {
            "model_config": {"model_type": "qwen3", "head_dim": 64, "vocab_size": 32768},
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 6,
            "intermediate_size": 1024,
        },
        4,
        512,
        2,
        6,
        is_large=True,
    ),
}


@dataclass
class Speed:
    """Of one side: tokens/s of the steps that count, and seconds to the end of the first step."""

    tokens_per_s: float
    first_step_s: float
    chosen: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the name of a case: bf16, fp32, gpt2, qwen3, 11M, 75M")
    arguments = parser.parse_args()
    result = earlier_result("against_trainer")
    for name, shape in SHAPES.items():
        cases = [("", ("bf16", "fp32"))] if shape.is_large else [(", bf16", ("bf16",)), (", fp32", ("fp32",))]
        for suffix, precisions in cases:
            if arguments.only not in name + suffix:
                continue
            measure = measure_large if shape.is_large else measure_round
            rounds = [measure(arguments.text, shape, precisions) for _ in range(arguments.repeats)]
            result[name + suffix] = summarize(name + suffix, rounds)
            write_result("against_trainer", result)


def summarize(name: str, rounds: list[dict[str, Speed]]) -> dict[str, Any]:
    """Ratios of sides in the same round, and the median of each over rounds; prints them."""
    pairs = [(ours, theirs) for ours in rounds[0] for theirs in rounds[0] if is_fair(ours, theirs)]
    ratios = {
        f"{ours} / {theirs}": [speeds[ours].tokens_per_s / speeds[theirs].tokens_per_s for speeds in rounds]
        for ours, theirs in pairs
    }
    if "onecard auto" in rounds[0]:
        ratios["onecard auto / faster Trainer"] = [
            speeds["onecard auto"].tokens_per_s / max(s.tokens_per_s for k, s in speeds.items() if "Trainer" in k)
            for speeds in rounds
        ]
    for label, values in ratios.items():
        print(f"{name}: {label} {statistics.median(values):.2f} x ({[round(value, 2) for value in values]})")
    first = {side: statistics.median(speeds[side].first_step_s for speeds in rounds) for side in rounds[0]}
    print(f"{name}: first step after {', '.join(f'{value:.1f} s {side}' for side, value in first.items())}")
    return {
        "rounds": [{side: speed.tokens_per_s for side, speed in speeds.items()} for speeds in rounds],
        "ratios": {label: statistics.median(values) for label, values in ratios.items()},
        "first_step_s": first,
        "chosen": next((speeds["onecard auto"].chosen for speeds in rounds if "onecard auto" in speeds), {}),
    }


def is_fair(ours: str, theirs: str) -> bool:
    """Whether two sides are one of ours and one of Trainer's, in the same type."""
    if not ours.startswith("onecard") or not theirs.startswith("Trainer") or ours == "onecard auto":
        return False
    return all((word in ours) == (word in theirs) for word in ("bf16", "fp32"))


def measure_round(text: Path, shape: Shape, precisions: tuple[str, ...]) -> dict[str, Speed]:
    """Every side in one type, one after the other; compiled, too, in fp32."""
    speeds = {}
    (precision,) = precisions
    for is_compiled in (False, True) if precision == "fp32" else (False,):
        suffix = " compiled" if is_compiled else ""
        recipe = make_recipe(text, shape, precision=precision, torch_compile=is_compiled)
        for side, run in (("onecard", run_onecard), ("Trainer", run_trainer)):
            torch._dynamo.reset()  # each run compiles for itself, as it would in a process of its own
            speeds[side + suffix] = run(recipe, shape)
    return speeds


def measure_large(text: Path, shape: Shape, precisions: tuple[str, ...]) -> dict[str, Speed]:
    """Both sides in every type, and onecard as it chooses by itself."""
    speeds = {}
    for precision in precisions:
        recipe = make_recipe(text, shape, precision=precision)
        speeds[f"onecard {precision}"] = run_onecard(recipe, shape)
        speeds[f"Trainer {precision}"] = run_trainer(recipe, shape)
    free = {"precision": "auto", "torch_compile": "auto", "per_device_train_batch_size": "auto"}
    free |= {"gradient_accumulation_steps": "auto", "total_batch_size": shape.batch_size}
    plan = onecard.plan(make_recipe(text, shape, **free, max_steps=5000))
    chosen = {
        "precision": plan.precision,
        "torch_compile": plan.torch_compile,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.num_micro_batches,
    }
    speeds["onecard auto"] = run_onecard(make_recipe(text, shape, **chosen), shape)
    speeds["onecard auto"].chosen = chosen
    return speeds


def make_recipe(text: Path, shape: Shape, **changes: Any) -> onecard.spec.Recipe:
    settings = {
        "name": "bench",
        "tokenizer": "char",
        "eval_fraction": 0.1,
        "max_seq_length": shape.length,
        "per_device_train_batch_size": shape.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": shape.num_warmup + shape.num_counted,
        "optim": "adamw",
        "learning_rate": 1e-3,
        "torch_compile": False,
        "init": "transformers",
        "tie_word_embeddings": True,
        "report_to": "none",
        "save_steps": 0,
        "eval_steps": 0,
    }
    return onecard.load_recipe({**settings, **shape.settings, **changes, "dataset": str(text)})


def run_onecard(recipe: onecard.spec.Recipe, shape: Shape) -> Speed:
    """A whole `onecard.train`, by its own record."""
    steps: list[Any] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        onecard.train(
            recipe,
            output_dir=Path(folder) / "run",
            on_event=lambda event: steps.append((time.perf_counter(), event)) if event.event == "step" else None,
        )
    first, last = steps[shape.num_warmup - 1], steps[-1]
    speed = (last[1].tokens_seen - first[1].tokens_seen) / (last[0] - first[0])
    return Speed(speed, steps[0][0] - started)


def run_trainer(recipe: onecard.spec.Recipe, shape: Shape) -> Speed:
    """Trainer over the same number of steps."""
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments

    transformers.logging.set_verbosity_error()
    is_bf16 = recipe.precision == "bf16"
    # Trainer keeps fp32 weights and casts by autocast.
    ours = assemble(onecard.plan(recipe.model_copy(update={"precision": "fp32"}))).model
    model = transformers.AutoModelForCausalLM.from_config(ours.config, attn_implementation="sdpa", dtype=torch.float32)
    model.load_state_dict(ours.state_dict())
    tokens = np.memmap(onecard.prepare(recipe).train[0].path, dtype=np.uint16, mode="r")
    length = shape.length

    class Blocks(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(tokens) // length

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(tokens[index * length : index * length + length].astype(np.int64))
            return {"input_ids": ids, "labels": ids}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    clock = Clock()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.batch_size,
            max_steps=shape.num_warmup + shape.num_counted,
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
    num_tokens = shape.num_counted * shape.batch_size * length
    return Speed(num_tokens / (clock.times[-1] - clock.times[shape.num_warmup - 1]), clock.times[0] - started)


if __name__ == "__main__":
    main()
