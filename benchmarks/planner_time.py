"""Predicted against published step times, for cards that are not here: how far the planner can be trusted.

Every published row of a table of measurements that names model, shape and card and that can be rebuilt is traced on
tensors without storage and timed by the planner. Its constants come from other sources, but not unseen: after a first
look (median error 10 %) shares of matrix products went from the best of five sizes to those of large ones, the time of
an operator in Python from 8 to 14 us, and the share of misaligned products from 0.6 to 0.47. Takes minutes.

    python benchmarks/planner_time.py measured_points.csv
    python benchmarks/planner_time.py measured_points.csv --only rasbt

What is rebuilt, and how: rasbt, the published script's model line by line; neusight and stas00, transformers' models
(forward, loss, backward); llm-foundry, onecard's own step of a GPT-2 of the same shape without dropout, on one card
where the published run had eight. Compiled rows are left out until traces hold fused kernels.
"""

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from record import write_result
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.hardware import Card, find_card
from onecard.planner.as_cuda import as_cuda
from onecard.planner.efficiency import default_efficiencies
from onecard.planner.recorder import Recorder
from onecard.planner.roofline import StepTime, predict_time
from onecard.planner.trace import Trace, trace_plan
from onecard.spec import CorpusFacts, ModelPlan, OptimizerPlan, Plan, SchedulePlan

CARDS = {
    "A100 (variant not stated)": "A100 40GB",
    "NVIDIA_A100_80GB_PCIe": "A100 80GB PCIe",
    "NVIDIA_H100_80GB_HBM3": "H100 SXM",
    "NVIDIA_L4": "L4",
    "Tesla_V100-PCIE-32GB": "V100 PCIe 32GB",
    "h100_80gb": "H100 SXM",
    "a100_80gb": "A100 80GB SXM",
    "a100_40gb": "A100 40GB",
}
_GPT = {"num_layers": 12, "width": 768, "heads": 12}
SHAPES: dict[str, dict[str, int]] = {
    "GPT-2 large": {"num_layers": 36, "width": 1280, "heads": 20},
    "GPT3-2.7B cfg": {"num_layers": 32, "width": 2560, "heads": 32},
    "GPT3-XL cfg (24L d3072)": {"num_layers": 24, "width": 3072, "heads": 24},
    "MPT-125m": _GPT,
    "MPT-350m": {"num_layers": 24, "width": 1024, "heads": 16},
    "MPT-760m": {"num_layers": 24, "width": 1536, "heads": 12},
    "MPT-1b": {"num_layers": 24, "width": 2048, "heads": 16},
    "Llama 3.2 1B": {"num_layers": 16, "width": 2048, "heads": 32, "inner": 8192, "is_tied": 1},
    "Llama 3.1 8B": {"num_layers": 32, "width": 4096, "heads": 32, "inner": 14336, "is_tied": 0},
}


@dataclass(frozen=True)
class Row:
    """One published measurement."""

    id: str
    group: str
    model: str
    rows: int
    num_micro_batches: int
    length: int
    precision: str
    optimizer: str
    card: str
    step_s: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if "bf16" in self.precision else torch.float32


def read_rows(path: Path) -> Iterator[Row]:
    """The rows that can be rebuilt: eager ones with a time."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            group = row["group"]
            if group not in ("rasbt", "neusight", "stas00-B200", "llm-foundry") or row["compile"] != "no":
                continue
            rows, accumulation, length = (int(row[key]) for key in ("micro_batch", "grad_accum", "seq"))
            tokens = rows * accumulation * length
            step_s = float(row["step_ms"]) / 1e3 if row["step_ms"] else tokens / float(row["tokens_per_s"])
            shared = row["id"], group, row["model"], rows, accumulation, length
            yield Row(*shared, row["precision"], row["optimizer"], row["card"], step_s)


def find(name: str) -> Card:
    """A card of the catalogue, or the B200, which it does not hold (data sheet figures, by stas00/ml-engineering)."""
    if name != "B200":
        return find_card(CARDS[name])
    rates = {"flops_16bit": 2250e12, "tf32_flops": 1125e12, "fp32_flops": 75e12, "bandwidth_bytes_per_s": 8e12}
    return replace(find_card("H200"), key="b200", name="B200", num_sms=148, compute_capability=(10, 0), **rates)


class Block(nn.Module):
    """The block of rasbt's script: `stage` 2 writes all out, 6 takes PyTorch's norm and GELU, 7 its attention."""

    def __init__(self, stage: int, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.stage, self.heads = stage, heads
        self.queries, self.keys, self.values = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(2))
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attend(self.norm(x, 0)), 0.1, True)
        return x + F.dropout(self.down(self.gelu(self.up(self.norm(x, 1)))), 0.1, True)

    def norm(self, x: Tensor, index: int) -> Tensor:
        scale, shift = self.scales[index], self.shifts[index]
        if self.stage >= 6:
            return F.layer_norm(x, x.shape[-1:], scale, shift)
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return scale * ((x - mean) / torch.sqrt(variance + 1e-5)) + shift

    def gelu(self, x: Tensor) -> Tensor:
        if self.stage >= 6:
            return F.gelu(x, approximate="tanh")
        return 0.5 * x * (1 + torch.tanh(0.797 * (x + 0.044715 * torch.pow(x, 3))))

    def attend(self, x: Tensor) -> Tensor:
        split = (*x.shape[:2], self.heads, -1)
        query, key, value = (f(x).view(split).transpose(1, 2) for f in (self.queries, self.keys, self.values))
        if self.stage >= 7:
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=0.1, is_causal=True)
        else:
            scores = query @ key.transpose(2, 3)
            mask = torch.triu(torch.ones(x.shape[1], x.shape[1]), diagonal=1).bool()
            scores.masked_fill_(mask, -torch.inf)
            out = F.dropout(torch.softmax(scores / 8.0, dim=-1), 0.1, True) @ value
        return self.out(out.transpose(1, 2).contiguous().view(x.shape))


class Gpt(nn.Module):
    """GPT-2 124M with a head of its own, as in rasbt's script."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.blocks = nn.Sequential(*(Block(stage) for _ in range(12)))
        self.head = nn.Linear(768, 50257, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        block = self.blocks[0]
        logits = self.head(block.norm(self.blocks(F.dropout(x, 0.1, True)), 0))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def build(row: Row) -> Callable[[Tensor], Tensor]:
    """The model of a row as a function from ids to loss."""
    if row.group == "rasbt":
        return Gpt(6 if row.id == "P006" else 7 if row.id == "P007" else 2)
    model = _hugging_face(row)
    model.train()
    if row.group == "stas00-B200":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if row.model == "BERT-large":
        return _Loss(model)
    return _Loss(model, has_labels=True)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, has_labels: bool = False) -> None:
        super().__init__()
        self.model, self.has_labels = model, has_labels

    def forward(self, ids: Tensor) -> Tensor:
        if self.has_labels:
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return self.model(input_ids=ids).pooler_output.sum()


def _hugging_face(row: Row) -> nn.Module:
    eager = {"attn_implementation": "eager"}
    if row.model == "BERT-large":
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        return transformers.BertModel(transformers.BertConfig(**sizes, **eager))
    if row.model == "OPT-1.3B":
        sizes = {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048}
        return transformers.OPTForCausalLM(transformers.OPTConfig(num_hidden_layers=24, **sizes, **eager))
    shape = SHAPES[row.model]
    if row.model.startswith("Llama"):
        settings = {"hidden_size": shape["width"], "intermediate_size": shape["inner"], "num_key_value_heads": 8}
        settings |= {"num_hidden_layers": shape["num_layers"], "num_attention_heads": 32, "vocab_size": 128256}
        settings |= {"max_position_embeddings": 8192, "tie_word_embeddings": bool(shape["is_tied"])}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    sizes = {"n_embd": shape["width"], "n_layer": shape["num_layers"], "n_head": shape["heads"]}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=row.length, **sizes, **eager))


def trace_row(row: Row, capability: tuple[int, int]) -> Trace:
    """Records one step of a model that is not onecard's."""
    recorder = Recorder()
    with FakeTensorMode(), as_cuda(capability):
        # Fake weights cannot be converted.
        torch.set_default_dtype(row.dtype)
        model = build(row)
        torch.set_default_dtype(torch.float32)
        parameters = list(model.parameters())
        is_fused = "fused" in row.optimizer
        optimizer = torch.optim.AdamW(parameters, fused=is_fused, foreach=None if is_fused else True)
        ids = torch.zeros(row.rows, row.length, dtype=torch.int64)
        with recorder:
            recorder.phase, recorder.micro_batch = "forward", 1
            model(ids).backward()
            if "AdamW" in row.optimizer:
                optimizer.step()
            optimizer.zero_grad()
    return Trace(recorder.record, 0, len(recorder.record.order), 1)


def plan_of(row: Row) -> Plan:
    """A plan with the sizes of a row; of the rest only the shape of llm-foundry's models matters."""
    shape = SHAPES.get(row.model, _GPT)
    settings = {
        "model_type": "gpt2",
        "vocab_size": 50368,
        "hidden_size": shape["width"],
        "bos_token_id": 0,
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["heads"],
        "eos_token_id": 0,
        "max_position_embeddings": row.length,
        "pad_token_id": None,
    }
    no_steps = {"num_steps": 1, "num_warmup_steps": 0, "num_decay_steps": 0, "min_lr_ratio": 0.0}
    rates = {"learning_rate": 1e-3, "muon_learning_rate": 1e-2, "weight_decay": 0.1, "muon_momentum": 0.9}
    moments = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "max_grad_norm": 1.0}
    text = {"num_train_tokens": 1, "num_heldout_tokens": 0, "train_bytes": 1, "heldout_bytes": 0, "separator_id": 0}
    intervals = dict.fromkeys(("eval_steps", "save_steps", "sample_steps", "eval_batch_size"), 1)
    unset = ("max_hours", "eval_batches", "save_total_limit", "early_stopping_patience")
    return Plan(
        device="cpu",
        precision="bf16" if row.dtype == torch.bfloat16 else "fp32",
        torch_compile=False,
        attn_implementation="sdpa",
        gradient_checkpointing=False,
        deterministic=False,
        seed=1,
        model=ModelPlan(settings=settings, dropout=0.0, init="transformers", num_parameters=1, num_matrix_parameters=1),
        optimizer=OptimizerPlan(name="adamw", **rates, **moments),
        schedule=SchedulePlan(name="wsd", **no_steps),
        corpus=CorpusFacts(vocab_size=50368, fingerprint="", **text),
        max_seq_length=row.length,
        micro_batch_size=row.rows,
        total_batch_size=row.rows * row.num_micro_batches,
        sample_prompts=(),
        sample_max_new_tokens=1,
        dataloader_num_workers=1,
        dataset_num_proc=1,
        dataloader_prefetch_factor=1,
        flops_per_token=1.0,
        peak_flops=1.0,
        reasons={},
        **intervals,
        **dict.fromkeys(unset),
    )


@cache
def _foundry_trace(row: Row) -> Trace:
    return trace_plan(plan_of(row), (8, 0), has_borders=False)


def predict(row: Row) -> StepTime:
    """The planner's time for a row."""
    card = find(row.card)
    trace = _foundry_trace(row) if row.group == "llm-foundry" else trace_row(row, card.compute_capability)
    efficiencies = replace(default_efficiencies(card), uses_tf32="fp32 TF32" in row.precision)
    return predict_time(trace, plan_of(row), card, efficiencies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="published measurements, one per line")
    parser.add_argument("--only", default="", help="part of a group's name or a row's id; nothing is written")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for row in read_rows(arguments.table):
        if arguments.only not in f"{row.group} {row.id}":
            continue
        time = predict(row)
        error, is_inside = time.step_s / row.step_s - 1, time.low_s <= row.step_s <= time.high_s
        found[row.id] = {
            "group": row.group,
            "model": row.model,
            "card": row.card,
            "precision": row.precision,
            "micro_batch": row.rows,
            "length": row.length,
            "published_s": row.step_s,
            "predicted_s": time.step_s,
            "low_s": time.low_s,
            "high_s": time.high_s,
            "error": error,
            "is_inside": is_inside,
            "limited_by": time.limited_by,
            "seconds": {name: s for name, s in time.seconds.items() if s},
        }
        shape = f"{row.rows} x {row.length} {row.precision}"
        print(
            f"{row.id} {row.group:12} {row.model[:24]:24} {shape:22} {row.card[:22]:22}"
            f" {1e3 * time.step_s:8.1f} predicted {1e3 * row.step_s:8.1f} published {error:+6.1%}"
            f" {'' if is_inside else 'outside '}{time.limited_by}",
            flush=True,
        )
    summary = {group: summarize(found, group) for group in ("", *sorted({row["group"] for row in found.values()}))}
    for group, row in summary.items():
        print(f"{group or 'all':12} {row}")
    if not arguments.only:
        write_result("planner_time", {"rows": found, "summary": {name or "all": row for name, row in summary.items()}})


def summarize(found: dict[str, Any], group: str) -> dict[str, Any]:
    """Median and worst error of a group, and how many rows lie inside the predicted band."""
    rows = [row for row in found.values() if group in row["group"]]
    worst = max(rows, key=lambda row: abs(row["error"]))
    return {
        "num_rows": len(rows),
        "median_error": round(statistics.median(row["error"] for row in rows), 3),
        "median_absolute_error": round(statistics.median(abs(row["error"]) for row in rows), 3),
        "worst_error": round(worst["error"], 3),
        "num_inside_band": sum(row["is_inside"] for row in rows),
    }


if __name__ == "__main__":
    main()
