"""What the user wants. A field may be `auto`; the planner turns it into a number with a reason.

Names are those of transformers' `TrainingArguments`, TRL and PEFT wherever one exists; `spelling.py` knows the others.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from onecard.spec.agreement import find_disagreements

Auto = Literal["auto"]
Epoch = Literal["epoch"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"]
# The upper bounds lie beyond all use: they keep a slip of the hand from reaching what aborts or fills the memory.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Size = Annotated[int, Field(gt=0, le=10**7)]
NumThreads = Annotated[int, Field(gt=0, le=1024)]
Interval = Annotated[int, Field(ge=0, le=10**9)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# Between none and all, which are false and true.
Share = Annotated[float, Field(gt=0, lt=1)]


class DatasetSource(BaseModel):
    """Where text comes from: a file, a glob, a folder, a Hub data set, or `python-stdlib`.

    `weight` is the share among several sources; `name` is the configuration of a Hub data set; `url` says
    where people can fetch a file that may be missing (nothing is downloaded).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str, Field(min_length=1)]  # an empty one would be the folder one stands in
    weight: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    text_column: str = "text"
    split: str = "train"
    name: str | None = None
    url: str | None = None


def _as_sources(value: Any) -> Any:
    """Accepts a path, a source, or a list of either, as people write them."""
    if value is None:
        return ()
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


def _as_list(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def _as_modules(value: Any) -> Any:
    """Accepts all-linear (the word alone or as a list of one), one name, several in one text, or a list."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        return value
    # A flag arrives as a list of one text, which may hold several names.
    parts = [part for name in names for part in (name.split(",") if isinstance(name, str) else [name])]
    names = tuple(part.strip() if isinstance(part, str) else part for part in parts if part)
    return "all-linear" if names == ("all-linear",) else names


def _as_tasks(value: Any) -> Any:
    """Accepts one name, several in one text, a list, or none."""
    names = _as_list(value)
    if not isinstance(names, list | tuple):
        return value
    # A flag arrives as one text, which may hold several names.
    parts = [part for name in names for part in (name.split(",") if isinstance(name, str) else [name])]
    found = tuple(part.strip() if isinstance(part, str) else part for part in parts if part)
    return () if found == ("none",) else found


def _as_report_targets(value: Any) -> Any:
    targets = _as_list(value)
    return () if targets in (["none"], ("none",)) else targets


class Recipe(BaseModel):
    """A training run as the user asks for it. `onecard.load_recipe` makes one."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    # What is done
    name: str = Field("recipe", description="name of the recipe; names the run folder")
    description: str = Field("", description="one sentence for `onecard recipes`")
    task: Literal["pretrain", "sft"] = Field(
        "pretrain",
        description="which targets count: pretrain, all of running text; sft, what the assistant says in chats",
    )
    method: Literal["full", "lora", "qlora"] = Field(
        "full", description="which weights move: all, or adapters beside weights that rest as they are or in 4 bits"
    )

    # Text
    dataset: Annotated[tuple[DatasetSource, ...], BeforeValidator(_as_sources)] = Field(
        (), description="file, glob, folder, JSONL / Parquet, tar shards, Hub data set, or a list with weights"
    )
    eval_dataset: Annotated[tuple[DatasetSource, ...], BeforeValidator(_as_sources)] = Field(
        (), description="held-out text; without it a part of `dataset` is held out"
    )
    eval_fraction: Fraction = Field(0.05, description="part of `dataset` that is held out")
    eval_split: Literal["auto", "documents", "tail"] = Field(
        "auto", description="hold out whole documents, or the tail of each"
    )
    tokenizer: str = Field("bpe", description="bpe, char, bytes, a tokenizer folder or a Hub name")
    vocab_size: Size | None = Field(None, description="vocabulary of a BPE tokenizer trained on the corpus")
    max_seq_length: Size = Field(1024, description="tokens per training block, most tokens of a chat")

    # Chats
    chat_template: str = Field(
        "auto", description="auto (the tokenizer's own), default, chatml, eos, or a file that holds one"
    )
    max_rounds: Positive | None = Field(None, description="newest rounds of a chat that are kept; null = all that fit")
    packing: bool = Field(True, description="chats share rows, each seeing only itself; false gives each its own row")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="refuse a set with unusable rows, or leave them out"
    )

    # Model
    model_name_or_path: str | None = Field(
        None, description="existing model to start from: a folder, a run, a Hub name, or modelscope:NAME"
    )
    model_settings: str | dict[str, Any] = Field(
        default_factory=dict,
        alias="model_config",
        description="transformers config from scratch: a mapping with model_type, a file or a folder",
    )
    hidden_size: Size | None = Field(None, description="width of the model")
    intermediate_size: Size | None = Field(None, description="width of the MLP")
    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)] | None = Field(None, description="number of layers")
    num_attention_heads: Size | None = Field(None, description="query heads per layer")
    num_key_value_heads: Size | None = Field(None, description="key and value heads per layer")
    tie_word_embeddings: bool | None = Field(None, description="share the input and output embedding")
    dropout: Fraction | None = Field(None, description="residual, embedding and attention dropout")
    init: Literal["transformers", "zero-output"] = Field(
        "zero-output", description="start from transformers' own weights, or with zero output projections of each block"
    )

    # Adapters
    lora_r: Annotated[int, Field(gt=0, le=65536)] = Field(16, description="rank of the adapters")
    lora_alpha: Annotated[int, Field(gt=0, le=10**6)] = Field(
        32, description="adapters are scaled by lora_alpha / lora_r"
    )
    lora_dropout: Fraction = Field(0.0, description="dropout before the adapters")
    lora_target_modules: Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(_as_modules)] = Field(
        "all-linear", description="layers that get an adapter: all-linear, or their names"
    )
    lora_bias: Literal["none", "all", "lora_only"] = Field("none", description="biases that train beside the adapters")
    double_quant: bool = Field(True, description="qlora: quantize the scales of 4-bit blocks, too")

    # Batch
    per_device_train_batch_size: Size | Auto = Field("auto", description="sequences per micro-batch; binding if given")
    gradient_accumulation_steps: Size | Auto = Field("auto", description="micro-batches per step")
    total_batch_size: Size | None = Field(None, description="sequences per step")
    total_batch_tokens: Positive | None = Field(None, description="tokens per step")
    per_device_eval_batch_size: Size | Auto = Field("auto", description="sequences per evaluation batch")

    # Optimizer and schedule
    optim: OptimizerName = Field(
        "muon", description="muon (matrices; AdamW for the rest) or adamw; adamw_8bit: small state; paged_: on the host"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        6e-3, description="AdamW's learning rate; of an existing model 2e-5, of adapters 2e-4"
    )
    muon_learning_rate: Annotated[float, Field(gt=0)] = Field(0.01, description="Muon's learning rate, for matrices")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled weight decay of matrices")
    adam_beta1: Fraction = Field(0.9, description="AdamW's first decay rate")
    adam_beta2: Fraction = Field(0.95, description="AdamW's second decay rate")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon")
    muon_momentum: Fraction = Field(0.95, description="Muon's momentum")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="gradient clipping; null switches it off"
    )
    on_nonfinite: Literal["skip", "lower_rate", "stop"] = Field(
        "skip",
        description="after several losses or gradients in a row that are not finite: go back to the last good "
        "checkpoint and skip these samples, or halve the rate; or stop",
    )
    lr_scheduler_type: str = Field("wsd", description="cosine, wsd, linear, constant, or module:function of progress")
    min_lr_ratio: Fraction = Field(0.0, description="final learning rate as a share of the peak")
    warmup_steps: Interval | None = Field(None, description="steps of linear warmup")
    warmup_ratio: Fraction | None = Field(None, description="warmup as a share of the run")
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = Field(0.4, description="share of the run that wsd decays")

    # Duration
    max_steps: Positive | None = Field(None, description="optimizer updates")
    num_train_epochs: Annotated[float, Field(gt=0, le=10**6)] | None = Field(
        None, description="passes over the training text"
    )
    max_tokens: Annotated[int, Field(gt=0, le=10**18)] | None = Field(None, description="training tokens")
    max_hours: Annotated[float, Field(gt=0, le=10**5)] | None = Field(
        None, description="most hours of training; alone, a short measurement turns them into steps"
    )

    # Machine
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="arithmetic; masters stay fp32")
    gradient_checkpointing: bool | Share | Auto = Field(
        "auto", description="recompute activations in the backward pass; a number: of this share of the layers"
    )
    loss_chunk_size: Size | Literal["full"] | Auto = Field(
        "auto", description="tokens whose logits exist at once; full: those of a whole micro-batch"
    )
    torch_compile: bool | Auto = Field(
        "auto", description="compile the decoder; auto: when it pays back within the run"
    )
    attn_implementation: Literal["auto", "sdpa", "varlen", "eager"] = Field(
        "auto", description="attention backend; eager: the family's own, which holds all scores"
    )
    memory_limit_gb: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        None, description="GiB (or, with its unit, 3.2GB) that training may reserve on the GPU; enforced in the run"
    )
    reserve_gb: Annotated[float, Field(ge=0, le=10_000)] | None = Field(
        None, description="GiB of what the GPU has free that training leaves to the desktop and other programs"
    )
    max_power_share: Annotated[float, Field(ge=0.01, le=1)] | None = Field(
        None, description="most of the time that the device computes; between steps it rests for the desktop and others"
    )
    fit: Literal["given", "auto"] = Field(
        "given", description="given: settings given by hand are binding; auto: they may change so that the run fits"
    )
    deterministic: bool = Field(False, description="bit-equal repetition on a GPU, at some speed")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(1337, description="seed of weights, order and dropout")
    dataloader_num_workers: Annotated[int, Field(ge=0, le=1024)] | Auto = Field(
        "auto", description="background batch workers"
    )
    dataloader_prefetch_factor: NumThreads = Field(4, description="steps prepared ahead per worker")
    dataset_num_proc: NumThreads | Auto = Field("auto", description="cores that tokenize")

    # Watching
    logging_steps: Positive | Epoch = Field(
        10, description="steps between printed lines when output is no terminal; epoch: of one"
    )
    eval_steps: Interval | Auto | Epoch = Field(
        "auto", description="steps between evaluations; epoch: of one; 0 = at the end only"
    )
    eval_batches: Positive | None = Field(
        None, description="held-out batches per evaluation; null = all of them, exactly"
    )
    early_stopping_patience: Positive | None = Field(
        None, description="evaluations without improvement before stopping"
    )
    eval_tasks: Annotated[tuple[str, ...], BeforeValidator(_as_tasks)] = Field(
        (), description="what checkpoints are scored by while training, besides their loss: ifeval, or none"
    )
    eval_limit: Positive = Field(
        64, description="prompts (items) of a task at every save; finalists are scored on all of them at the end"
    )
    eval_max_new_tokens: Size = Field(1280, description="tokens of a response to a task, at most")
    ifeval_data: str | None = Field(None, description="IFEval's input_data.jsonl; without it google/IFEval of the Hub")
    metric_for_best_model: str = Field(
        "auto", description="what `best` means: loss, or one of eval_tasks; auto: the first of them, else loss"
    )
    sample_steps: Interval | Auto = Field("auto", description="steps between samples; 0 = at the end only")
    sample_prompts: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field((), description="prompts to complete")
    sample_max_new_tokens: Size = Field(64, description="length of a sample")
    save_steps: Interval | Auto | Epoch = Field(
        "auto", description="steps between checkpoints; epoch: of one; 0 = at the end only"
    )
    save_minutes: Annotated[float, Field(gt=0, le=10**6)] | None = Field(
        10.0, description="minutes of training after which a checkpoint is written, whatever save_steps; null = never"
    )
    save_total_limit: Positive | None = Field(3, description="checkpoints kept, best and last always")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="how several processes share a run: ddp, each holds all of it; fsdp, each a part"
    )
    ddp_timeout: Positive = Field(
        1800, description="seconds after which a process that does not answer the others of its run is taken for lost"
    )
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        3, description="times in a row that a training process which dies is started again; 0 = no supervisor"
    )
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_as_report_targets)] = Field(
        ("tensorboard",), description="tensorboard, wandb, or none"
    )
    run_name: str | None = Field(None, description="name of the run in W&B")
    output_dir: str | None = Field(None, description="run folder; default runs/<recipe>-<time>")
    resume_from_checkpoint: str | bool | None = Field(
        None, description="run folder or checkpoint to continue; latest or true: the newest run under runs/"
    )

    # Variants
    size: str | None = Field(None, description="one of the recipe's sizes")
    sizes: dict[str, dict[str, Any]] = Field(default_factory=dict, description="named overrides, chosen by `size`")
    on_device: dict[Literal["cpu", "cuda"], dict[str, Any]] = Field(
        default_factory=dict, description="overrides that hold on a kind of device"
    )

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if problems := find_disagreements(self):
            raise ValueError("\n".join(problems))
        return self
