"""Every decision of a run as a number, each with its reason. A Plan never says `auto`."""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onecard.spec.forecast import Alternative, Forecast
from onecard.spec.recipe import OptimizerName, Share, Size

# Of a row of packed chats: what the best-fitting ones leave free.
_FILLED_SHARE = 0.95


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class CorpusFacts(_Frozen):
    """What planning needs to know of a prepared corpus. `fingerprint` is a hash of its content."""

    vocab_size: int
    num_train_tokens: int
    num_heldout_tokens: int
    train_bytes: int
    heldout_bytes: int
    separator_id: int
    fingerprint: str
    num_train_documents: int | None = None
    # Of chats: conversations to train on, and the tokens that count; `heldout_bytes` is then the text of targets.
    num_train_rows: int | None = None
    num_target_tokens: int | None = None
    num_heldout_target_tokens: int | None = None
    # Special tokens that the chat template writes, by id, and those that the vocabulary lacked.
    control_tokens: tuple[tuple[str, int], ...] = ()
    new_tokens: tuple[str, ...] = ()
    # From the sizes of files, because the text was not looked at.
    is_estimate: bool = False
    # Name and training tokens of each source.
    tokens_of_sources: tuple[tuple[str, int], ...] = ()

    def steps_per_epoch(self, total_batch_size: int, max_seq_length: int) -> int:
        """Steps of so many sequences after which each text or chat has been learned once."""
        rows = self.num_train_rows or self.num_train_tokens / max_seq_length
        return max(1, math.ceil(rows / total_batch_size))


class BasePlan(_Frozen):
    """The existing model that a run starts from: `name` as given, `folder` where its files lie.

    `fingerprint` tells its weights from any others. Both are None in a plan that was made without the weights, from
    the config or from what the package knows of the model: such a plan can be looked at, not trained.
    `num_new_tokens`: rows that the vocabulary is extended by; with adapters they are trained beside them, and so are
    those of `untrained_tokens`, which the chat template writes and the base never learned.
    """

    name: str
    folder: str | None = None
    fingerprint: str | None = None
    num_new_tokens: int = Field(default=0, ge=0)
    untrained_tokens: tuple[int, ...] = ()
    download_bytes: int | None = None


class ModelPlan(_Frozen):
    """A model: `settings` are a complete transformers config with `model_type`.

    `base` is there where `init` is `pretrained`; settings then describe its shape, new tokens included.
    """

    settings: dict[str, Any]
    dropout: float
    init: Literal["transformers", "zero-output", "pretrained"]
    num_parameters: int
    num_matrix_parameters: int
    base: BasePlan | None = None

    @property
    def learned_tokens(self) -> tuple[int, ...]:
        """Tokens whose rows move beside adapters."""
        if self.base is None:
            return ()
        size = self.settings["vocab_size"]
        return *self.base.untrained_tokens, *range(size - self.base.num_new_tokens, size)

    @model_validator(mode="after")
    def _starts_from_its_base(self) -> Self:
        if (self.init == "pretrained") != (self.base is not None):
            raise ValueError("init pretrained and a base belong together")
        return self


class AdaptPlan(_Frozen):
    """Adapters beside frozen weights, by PEFT's names; `qlora` lets those weights rest in 4 bits.

    `double_quant`: whether the scales of 4-bit blocks are quantized, too. A run without this part trains all weights.
    """

    method: Literal["lora", "qlora"]
    r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    double_quant: bool = True


class OptimizerPlan(_Frozen):
    """Rates at the peak of the schedule; `weight_decay` is decoupled and applies to matrices."""

    name: OptimizerName
    learning_rate: float
    muon_learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    muon_momentum: float
    max_grad_norm: float | None

    @property
    def is_8bit(self) -> bool:
        """Whether the moments of matrices rest in 8 bits."""
        return self.name.endswith("_8bit")

    @property
    def is_paged(self) -> bool:
        """Whether the state may leave the card for the memory of the host."""
        return self.name.startswith("paged_")


class SchedulePlan(_Frozen):
    """Learning rate over `num_steps`: linear warmup, then `name`, ending at `min_lr_ratio` of the peak."""

    name: str
    num_steps: int
    num_warmup_steps: int
    num_decay_steps: int
    min_lr_ratio: float


class EvalTasksPlan(_Frozen):
    """What checkpoints are scored by besides their loss: so many items of each task at every save, then all of them.

    `metric` says what the best checkpoint is best by: `loss`, or one of `names`. `num_items` and `data` (a hash) are of
    the whole tasks, in their order; None where they were not looked at. `cache_bytes` are the keys and values of a
    batch of responses of full length, without their prompts; what does not fit a GPU is halved.
    """

    names: tuple[str, ...]
    metric: str
    limit: int
    max_new_tokens: int
    batch_size: int
    num_items: tuple[int, ...] | None = None
    data: tuple[str, ...] | None = None
    cache_bytes: int | None = None


class Plan(_Frozen):
    """A run without open questions. `reasons` says, per field (`schedule.num_steps`), why it is so.

    `flops_per_token` counts forward and backward: 6 x matrix parameters (4 x where they are frozen) + 6 x layers x
    attention width x length (of chats the mean).
    `peak_flops` is a large matrix product in `precision`, measured on the device.
    """

    task: Literal["pretrain", "sft"] = "pretrain"
    # How chats share the rows of a micro-batch: each has its own, several share one, or all stand in a single row.
    packing: Literal["off", "rows", "flat"] = "off"
    device: str
    precision: Literal["bf16", "fp16", "fp32"]
    torch_compile: bool
    # apart: eager, where documents cannot share a row.
    attn_implementation: Literal["sdpa", "varlen", "eager", "apart"]
    # A number between: the share of layers, from the first on, whose activations are computed again.
    gradient_checkpointing: bool | Share
    # Tokens whose logits exist at once; None, in plans from before it was a choice, is what the loss takes by itself.
    loss_chunk_size: Size | Literal["full"] | None = None
    deterministic: bool
    seed: int

    model: ModelPlan
    adapt: AdaptPlan | None = None
    optimizer: OptimizerPlan
    schedule: SchedulePlan
    corpus: CorpusFacts

    max_seq_length: int
    micro_batch_size: int
    total_batch_size: int
    eval_batch_size: int
    max_hours: float | None

    eval_steps: int
    eval_batches: int | None
    save_steps: int
    save_total_limit: int | None
    sample_steps: int
    sample_prompts: tuple[str, ...]
    sample_max_new_tokens: int
    early_stopping_patience: int | None

    dataloader_num_workers: int
    dataloader_prefetch_factor: int
    dataset_num_proc: int

    flops_per_token: float
    peak_flops: float
    reasons: dict[str, str]

    # What a run does after several updates in a row that had to be refused.
    on_nonfinite: Literal["skip", "lower_rate", "stop"] = "skip"
    # None, also in plans from before it was a choice: no clock asks for a checkpoint.
    save_minutes: float | None = None
    eval_tasks: EvalTasksPlan | None = None
    # How several processes share a run: each holds the whole state, or a part of it.
    strategy: Literal["ddp", "fsdp"] = "ddp"
    # Whether dropout is drawn for each micro-batch anew, so that it does not show which rank has it.
    seeds_micro_batches: bool = False
    num_threads: int | None = None
    # Of the time that training takes it computes so much at most, and rests for the rest of it.
    max_power_share: float | None = None
    memory_limit_bytes: int | None = None
    forecast: Forecast | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which each text or chat has been learned once."""
        return self.corpus.steps_per_epoch(self.total_batch_size, self.max_seq_length)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step; of chats, whose lengths differ, the mean."""
        if self.corpus.num_train_rows is None:
            return self.total_batch_size * self.max_seq_length
        return max(1, round(self.total_batch_size * self.corpus.num_train_tokens / self.corpus.num_train_rows))

    @property
    def has_borders(self) -> bool:
        """Whether texts end inside the rows of a batch, which asks for other attention kernels."""
        if self.task == "sft":
            return self.packing != "off"
        if self.attn_implementation == "apart":
            return False  # each is then a batch of its own, and a row that is one document the largest
        return self.corpus.num_train_documents != 1

    @property
    def has_static_shapes(self) -> bool:
        """Whether micro-batches of chats are padded to full rows: one shape for a compiler, as planned on a GPU."""
        return self.task == "sft" and (
            self.torch_compile or (self.packing == "rows" and self.device.startswith("cuda"))
        )

    @property
    def rows_per_step(self) -> int:
        """Rows of up to `max_seq_length` tokens that a step is made of; of packed chats, those they fill on average."""
        if self.packing == "off":
            return self.total_batch_size
        filled = math.ceil(self.tokens_per_step / (_FILLED_SHARE * self.max_seq_length))
        return min(self.total_batch_size, filled)

    @property
    def num_micro_batches(self) -> int:
        return -(-self.rows_per_step // self.micro_batch_size)


def explain_refusal(error: Exception) -> str:
    """Says in one line why a file is no plan: the first of its fields that is wrong, and how many are."""
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    first, *others = error.errors()
    place = ".".join(map(str, first["loc"]))
    more = f", and {len(others)} more" if others else ""
    return (f"{place}: " if place else "") + first["msg"].rstrip(".") + more
