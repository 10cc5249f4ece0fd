"""LitGPT's fine-tuning scripts as programs that can be recorded: LoRA, QLoRA and full, of 2023 and of 2024.

Written anew after github.com/Lightning-AI/litgpt: commit 8641822 (October 2023, named by tutorials/resource-tables.md)
and 00af8b0d (September 2024, config_hub/finetune/README.md). What decides memory is kept: the fused qkv LoRA layer
whose update is padded with zeros, rotary angles in fp32 (they are made anew outside the bf16 context once the longest
sample is known), the head in pieces of 128 tokens, that Fabric turns what a half-precision model returns into fp32
(`HalfPrecision.convert_output` and `BitsandbytesPrecision.convert_output` of lightning), and that these logits, and
with them the graph, live until the next forward pass has ended.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from litgpt_layers import Shape, Tuning
from litgpt_model import Model
from torch import Tensor, nn

from onecard.planner.recorder import Recorder
from onecard.planner.trace import Program

_HEAD_CHUNK = 128
# Parts of the names of what is trained, by adapter.
_TRAINED = {0: ("lora_",), 1: ("adapter_",), 2: ("adapter_", "norm")}
_IGNORED = -100


def _llama(layers: int, width: int, heads: int, groups: int, gated_width: int, vocabulary: int = 32000) -> Shape:
    return Shape(
        layers, width, heads, groups, vocabulary, 1.0, is_parallel=False, has_bias=False, gated_width=gated_width
    )


SHAPES = {
    "phi-1.5": Shape(24, 2048, vocabulary=51200, rotary_share=0.5, shares_norm=True, has_head_bias=True),
    "phi-2": Shape(32, 2560, vocabulary=51200, rotary_share=0.4, shares_norm=True, has_head_bias=True),
    "StableLM Alpha 3B": Shape(),
    "Llama 2 7B": _llama(32, 4096, 32, 32, 11008),
    "Llama 2 13B": _llama(40, 5120, 40, 40, 13824),
    "TinyLlama 1.1B": _llama(22, 2048, 32, 4, 5632),
    "Mistral 7B": _llama(32, 4096, 32, 8, 14336),
    "Llama 3 8B": _llama(32, 4096, 32, 8, 14336, 128256),
    "Llama 3.2 1B": _llama(16, 2048, 32, 8, 8192, 128256),
    "Falcon 7B": Shape(32, 4544, 71, 1, 65024, 1.0, shares_norm=True, has_bias=False),
}


def make_program(shape: Shape, tuning: Tuning) -> Program:
    """Micro-batches of the lengths of `tuning`, then an update, as one program."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Model(shape, tuning)
    finally:
        torch.set_default_dtype(torch.float32)
    if trained := _TRAINED.get(tuning.adapter, ()) if tuning.adapter or tuning.rank else ():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))

    def run(recorder: Recorder) -> None:
        _train(recorder, model, tuning)

    return Program({"weights": [*model.parameters(), *model.buffers()]}, None, run)


def _train(recorder: Recorder, model: nn.Module, tuning: Tuning) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW(trained) if tuning.quantization else torch.optim.AdamW(trained, foreach=True)
    for lengths in tuning.lengths:
        for length in lengths:
            ids, targets = (torch.zeros(tuning.batch, length, dtype=torch.int64) for _ in range(2))
            recorder.phase = "forward"
            if tuning.rank or tuning.adapter:
                logits = [part.float() for part in model(ids, _HEAD_CHUNK)]
                logits[-1] = logits[-1][..., :-1, :]
                loss = _loss_of_chunks(logits, targets[..., 1:])
            else:
                logits = model(ids).float()
                loss = _loss(logits[..., :-1, :], targets[..., 1:])
            (loss / 8).backward()
            if not tuning.is_of_2023:
                loss = loss.detach()
        optimizer.step()
        optimizer.zero_grad()


class PagedAdamW(torch.optim.Optimizer):
    """bitsandbytes' optimizer of the quantized rows: fp32 moments, for tensors of 100,000 values and more in memory
    that the driver pages and PyTorch does not count."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Makes the moments; the update itself takes no memory."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel() < 100_000 and not self.state[parameter]:
                    for name in ("state1", "state2"):
                        self.state[parameter][name] = torch.zeros(parameter.shape, dtype=torch.float32)


def _loss_of_chunks(logits: list[Tensor], targets: Tensor) -> Tensor:
    parts = [part.reshape(-1, part.shape[-1]) for part in logits]
    target_parts = [part.reshape(-1) for part in targets.split(logits[0].shape[1], dim=1)]
    return _mean_loss(parts, target_parts, targets)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.reshape(-1, logits.shape[-1])
    targets = targets.reshape(-1)
    return _mean_loss(logits.split(_HEAD_CHUNK), targets.split(_HEAD_CHUNK), targets)


def _mean_loss(parts: Sequence[Tensor], target_parts: Sequence[Tensor], targets: Tensor) -> Tensor:
    losses = [
        F.cross_entropy(part, target_part, ignore_index=_IGNORED, reduction="none")
        for part, target_part in zip(parts, target_parts, strict=True)
    ]
    num_targets = (targets != _IGNORED).sum()
    return torch.cat(losses).sum() / num_targets.clamp(min=1)


def _resource_tables() -> dict[str, tuple[str, Tuning]]:
    """LoRA rows of tutorials/resource-tables.md: the longest sample comes first, then ones of the median, 110 tokens
    (tutorials/oom.md)."""
    rows = {}
    number = 11
    for model, longest, batches in (
        ("phi-1.5", 1044, (2, 4)),
        ("StableLM Alpha 3B", 1034, (2, 4)),
        ("Llama 2 7B", 1304, (2,)),
        ("Llama 2 13B", 1304, ()),
    ):
        for batch, quantization in (*((1, name) for name in ("", "nf4", "nf4-dq")), *((b, "") for b in batches)):
            rows[f"P{number:03}"] = (model, Tuning(((longest, 110),), batch, quantization=quantization))
            number += 1
    return rows


def _adapter_tables() -> dict[str, tuple[str, Tuning]]:
    """Adapter rows of the same tables, of January 2024 (0f021f3a)."""
    rows = {}
    number = 28
    for adapter in (1, 2):
        for model, longest in (("StableLM Alpha 3B", 1034), ("Llama 2 7B", 1304)):
            for quantization in ("", "nf4", "nf4-dq"):
                tuning = Tuning(((longest, 110),), rank=0, adapter=adapter, quantization=quantization)
                rows[f"P{number:03}"] = (model, tuning)
                number += 1
    return rows


def _config_hub() -> dict[str, tuple[str, Tuning, float]]:
    """Rows of config_hub/finetune/README.md on one A10G, with the published GB: Alpaca 2k cut to 512 tokens, where
    two micro-batches of full length follow one another now and then."""
    rows = {}
    for model, batches, rank, adapts_all, published in (
        ("StableLM Alpha 3B", (1, 1), 32, False, (8.58, 5.24)),
        ("Llama 2 7B", (2, 2), 32, False, (19.77, 13.68)),
        ("Llama 3 8B", (1, 2), 32, False, (19.73, 17.41)),
        ("Llama 3.2 1B", (1, 2), 32, False, (4.49, 5.53)),
        ("Mistral 7B", (2, 2), 32, False, (20.66, 14.29)),
        ("Falcon 7B", (1, 1), 32, False, (16.69, 9.44)),
        ("phi-2", (4, 4), 8, True, (13.98, 14.27)),
        ("TinyLlama 1.1B", (8, 8), 32, True, (13.50, 16.24)),
    ):
        for name, batch, gigabytes in zip(("lora", "qlora"), batches, published, strict=True):
            quantization = "nf4" if name == "qlora" else ""
            lengths = ((512, 512),) * 2
            tuning = Tuning(lengths, batch, rank, adapts_all, quantization=quantization, is_of_2023=False)
            rows[f"{model} {name}"] = (model, tuning, gigabytes)
    # Left out: Llama 3.2 1B full, 8.70 GB, less than its weights and the two moments of each (9.0 GB).
    rows["TinyLlama 1.1B full"] = ("TinyLlama 1.1B", Tuning(((512, 512),) * 2, 4, 0, is_of_2023=False), 14.10)
    return rows


RESOURCE_TABLES = _resource_tables()
ADAPTER_TABLES = _adapter_tables()
CONFIG_HUB = _config_hub()
