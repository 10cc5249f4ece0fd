"""Plans of existing models in training, made without a recipe: what benchmarks ask the planner about."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from onecard.model.build import count_parameters
from onecard.planner.shape import attention_width
from onecard.spec import AdaptPlan, CorpusFacts, ModelPlan, OptimizerPlan, Plan, SchedulePlan

Method = Literal["full", "lora", "qlora"]

_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "bos_token_id": 50256, "eos_token_id": 50256}
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "pad_token_id": None}
# By the config.json of each model on the Hugging Face Hub; the last two are shapes of shipped recipes.
SHAPES: dict[str, dict[str, Any]] = {
    "distilgpt2": _GPT2 | {"n_embd": 768, "n_layer": 6, "n_head": 12},
    "gpt2": _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "DialoGPT-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "SmolLM2-135M": _LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "max_position_embeddings": 8192, "vocab_size": 49152, "tie_word_embeddings": True}
    | {"bos_token_id": 0, "eos_token_id": 0},
    "TinyLlama-1.1B": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 32000, "tie_word_embeddings": False}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "qwen3-75M": {"model_type": "qwen3", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"num_key_value_heads": 6, "head_dim": 64, "intermediate_size": 1024, "vocab_size": 32768}
    | {"tie_word_embeddings": True, "max_position_embeddings": 2048, "pad_token_id": None},
    "qwen3-23M": {"model_type": "qwen3", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
    | {"num_key_value_heads": 6, "head_dim": 64, "intermediate_size": 1024, "vocab_size": 32768}
    | {"tie_word_embeddings": True, "max_position_embeddings": 2048, "pad_token_id": None},
}
# GPT-2's own; none of the others has dropout.
_GPT2_DROPOUT = 0.1


@dataclass(frozen=True)
class Setting:
    """One way to train one model. `settings` overrides the shape of that name, `dropout` the model's own."""

    model: str
    micro_batch: int
    length: int
    method: Method = "full"
    num_micro_batches: int = 1
    recomputes: bool | float = False
    is_compiled: bool = False
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    limit_bytes: int | None = None
    dropout: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Unique among the settings of a benchmark."""
        words = [self.model, self.method, f"{self.micro_batch} x {self.length}"]
        if self.num_micro_batches > 1:
            words.append(f"x {self.num_micro_batches}")
        kept = {False: "kept", True: "recomputed"}.get(self.recomputes, f"{self.recomputes:.0%} recomputed")
        words += ["compiled" if self.is_compiled else "eager", kept]
        return " ".join([*words, *([] if self.precision == "bf16" else [self.precision])])

    def but(self, **changes: Any) -> "Setting":
        """The same with changes."""
        return replace(self, **changes)

    def plan(self, device: str, limit_bytes: int) -> Plan:
        """The plan, AdamW with fp32 masters and moments; adapters are of rank 16 beside all linear layers."""
        shape = SHAPES[self.model] | dict(self.settings)
        total, matrices = count_parameters(shape)
        num_layers, width = attention_width(shape)
        # Frozen weights have no gradient of their own: two thirds of the products.
        per_matrix = 6.0 if self.method == "full" else 4.0
        return Plan(
            device=device,
            precision=self.precision,
            torch_compile=self.is_compiled,
            gradient_checkpointing=self.recomputes,
            model=ModelPlan(
                settings=shape,
                dropout=self._dropout(shape["model_type"]),
                init="transformers",
                num_parameters=total,
                num_matrix_parameters=matrices,
            ),
            adapt=None if self.method == "full" else AdaptPlan(method=self.method, r=16),
            max_seq_length=self.length,
            micro_batch_size=self.micro_batch,
            total_batch_size=self.micro_batch * self.num_micro_batches,
            eval_batch_size=self.micro_batch,
            flops_per_token=per_matrix * matrices + 6.0 * num_layers * width * self.length,
            memory_limit_bytes=min(limit_bytes, self.limit_bytes or limit_bytes),
            corpus=_corpus(shape["vocab_size"]),
            **_REST,
        )

    def _dropout(self, model_type: str) -> float:
        own = _GPT2_DROPOUT if model_type == "gpt2" else 0.0
        return own if self.dropout is None else self.dropout


def _corpus(vocab_size: int) -> CorpusFacts:
    """A text of many documents, so that rows have borders and attention needs its mask."""
    return CorpusFacts(
        vocab_size=vocab_size,
        num_train_tokens=10_000_000,
        num_heldout_tokens=0,
        train_bytes=40_000_000,
        heldout_bytes=0,
        separator_id=0,
        fingerprint="",
        num_train_documents=10_000,
    )


_REST: dict[str, Any] = {
    "attn_implementation": "sdpa",
    "deterministic": False,
    "seed": 1337,
    "optimizer": OptimizerPlan(
        name="adamw",
        learning_rate=3e-4,
        muon_learning_rate=0.02,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        muon_momentum=0.95,
        max_grad_norm=1.0,
    ),
    "schedule": SchedulePlan(name="cosine", num_steps=100, num_warmup_steps=10, num_decay_steps=90, min_lr_ratio=0.1),
    "max_hours": None,
    "eval_steps": 100,
    "eval_batches": 1,
    "save_steps": 100,
    "save_total_limit": 1,
    "sample_steps": 100,
    "sample_prompts": (),
    "sample_max_new_tokens": 1,
    "early_stopping_patience": None,
    "dataloader_num_workers": 1,
    "dataloader_prefetch_factor": 1,
    "dataset_num_proc": 1,
    "peak_flops": 1e12,
    "reasons": {},
}
