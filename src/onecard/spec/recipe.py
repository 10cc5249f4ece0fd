"""What the user wants. A field may be `auto`; the planner turns it into a number with a reason.

Names are those of transformers' `TrainingArguments`, TRL and PEFT wherever one exists; `spelling.py` knows the others.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# Keys of which a recipe may hold one; giving another in a later layer replaces it.
DURATION_KEYS = ("max_steps", "num_train_epochs", "max_tokens")
WARMUP_KEYS = ("warmup_steps", "warmup_ratio")
TOTAL_BATCH_KEYS = ("total_batch_size", "total_batch_tokens")


class DatasetSource(BaseModel):
    """Where text comes from: a file, a glob, a folder, a Hub data set, or `python-stdlib`.

    `weight` is the share among several sources; `name` is the configuration of a Hub data set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    text_column: str = "text"
    split: str = "train"
    name: str | None = None


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


def _as_report_targets(value: Any) -> Any:
    targets = tuple(_as_list(value))
    return () if targets == ("none",) else targets


class Recipe(BaseModel):
    """A training run as the user asks for it. `onecard.load_recipe` makes one."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    # What is done
    name: str = Field("recipe", description="name of the recipe; names the run folder")
    description: str = Field("", description="one sentence for `onecard recipes`")
    task: Literal["pretrain"] = Field("pretrain", description="which targets count: every token of running text")
    method: Literal["full"] = Field("full", description="which weights move: all of them")

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
    vocab_size: Positive | None = Field(None, description="vocabulary of a BPE tokenizer trained on the corpus")
    max_seq_length: Positive = Field(1024, description="tokens per training block")

    # Model
    model_settings: str | dict[str, Any] = Field(
        default_factory=dict,
        alias="model_config",
        description="transformers config from scratch: a mapping with model_type, a file or a folder",
    )
    hidden_size: Positive | None = Field(None, description="width of the model")
    intermediate_size: Positive | None = Field(None, description="width of the MLP")
    num_hidden_layers: Positive | None = Field(None, description="number of layers")
    num_attention_heads: Positive | None = Field(None, description="query heads per layer")
    num_key_value_heads: Positive | None = Field(None, description="key and value heads per layer")
    tie_word_embeddings: bool | None = Field(None, description="share the input and output embedding")
    dropout: Fraction | None = Field(None, description="residual, embedding and attention dropout")
    init: Literal["transformers", "zero-output"] = Field(
        "zero-output", description="start from transformers' own weights, or with zero output projections of each block"
    )

    # Batch
    per_device_train_batch_size: Positive | Auto = Field(
        "auto", description="sequences per micro-batch; binding if given"
    )
    gradient_accumulation_steps: Positive | Auto = Field("auto", description="micro-batches per step")
    total_batch_size: Positive | None = Field(None, description="sequences per step")
    total_batch_tokens: Positive | None = Field(None, description="tokens per step")
    per_device_eval_batch_size: Positive | Auto = Field("auto", description="sequences per evaluation batch")

    # Optimizer and schedule
    optim: Literal["adamw", "muon"] = Field("muon", description="muon (matrices; AdamW for the rest) or adamw")
    learning_rate: Annotated[float, Field(gt=0)] = Field(6e-3, description="AdamW's learning rate")
    muon_learning_rate: Annotated[float, Field(gt=0)] = Field(0.01, description="Muon's learning rate, for matrices")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled weight decay of matrices")
    adam_beta1: Fraction = Field(0.9, description="AdamW's first decay rate")
    adam_beta2: Fraction = Field(0.95, description="AdamW's second decay rate")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon")
    muon_momentum: Fraction = Field(0.95, description="Muon's momentum")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="gradient clipping; null switches it off"
    )
    lr_scheduler_type: str = Field("wsd", description="cosine, wsd, linear, constant, or module:function of progress")
    min_lr_ratio: Fraction = Field(0.0, description="final learning rate as a share of the peak")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="steps of linear warmup")
    warmup_ratio: Fraction | None = Field(None, description="warmup as a share of the run")
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = Field(0.4, description="share of the run that wsd decays")

    # Duration
    max_steps: Positive | None = Field(None, description="optimizer updates")
    num_train_epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="passes over the training text")
    max_tokens: Positive | None = Field(None, description="training tokens")
    max_hours: Annotated[float, Field(gt=0)] | None = Field(
        None, description="hours of training; a short measurement turns them into steps"
    )

    # Machine
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="arithmetic; masters stay fp32")
    gradient_checkpointing: bool | Auto = Field("auto", description="recompute activations in the backward pass")
    torch_compile: bool | Auto = Field(
        "auto", description="compile the decoder; auto: when it pays back within the run"
    )
    attn_implementation: Literal["auto", "sdpa", "varlen"] = Field("auto", description="attention backend")
    deterministic: bool = Field(False, description="bit-equal repetition on a GPU, at some speed")
    seed: Annotated[int, Field(ge=0)] = Field(1337, description="seed of weights, order and dropout")
    dataloader_num_workers: Annotated[int, Field(ge=0)] | Auto = Field("auto", description="background batch workers")
    dataloader_prefetch_factor: Positive = Field(4, description="steps prepared ahead per worker")
    dataset_num_proc: Positive | Auto = Field("auto", description="cores that tokenize")

    # Watching
    logging_steps: Positive = Field(10, description="steps between printed lines when output is no terminal")
    eval_steps: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="steps between evaluations; 0 = at the end only"
    )
    eval_batches: Positive | None = Field(
        None, description="held-out batches per evaluation; null = all of them, exactly"
    )
    early_stopping_patience: Positive | None = Field(
        None, description="evaluations without improvement before stopping"
    )
    sample_steps: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="steps between samples; 0 = at the end only"
    )
    sample_prompts: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field((), description="prompts to complete")
    sample_max_new_tokens: Positive = Field(64, description="length of a sample")
    save_steps: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="steps between checkpoints; 0 = at the end only"
    )
    save_total_limit: Annotated[int, Field(ge=1)] | None = Field(
        3, description="checkpoints kept, best and last always"
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
        problems = [problem for check in _CHECKS if (problem := check(self))]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _one_of(recipe: Recipe, keys: tuple[str, ...]) -> str | None:
    given = [key for key in keys if getattr(recipe, key) is not None]
    if len(given) > 1:
        return f"{' and '.join(given)} contradict each other: keep one of them"
    return None


def _duration(recipe: Recipe) -> str | None:
    return _one_of(recipe, DURATION_KEYS)


def _warmup(recipe: Recipe) -> str | None:
    return _one_of(recipe, WARMUP_KEYS)


def _total_batch(recipe: Recipe) -> str | None:
    if problem := _one_of(recipe, TOTAL_BATCH_KEYS):
        return problem
    total, micro = recipe.total_batch_size, recipe.per_device_train_batch_size
    accumulation = recipe.gradient_accumulation_steps
    if recipe.total_batch_tokens is not None:
        if recipe.total_batch_tokens < recipe.max_seq_length:
            return (
                f"total_batch_tokens {recipe.total_batch_tokens} is less than one sequence of "
                f"{recipe.max_seq_length} tokens: raise it, or lower max_seq_length"
            )
        total = recipe.total_batch_tokens // recipe.max_seq_length
    if total is None:
        return None
    if micro != "auto" and accumulation != "auto" and micro * accumulation != total:
        return (
            f"per_device_train_batch_size {micro} x gradient_accumulation_steps {accumulation} = "
            f"{micro * accumulation} sequences per step, but the total batch is {total}: drop one of the three"
        )
    if micro != "auto" and micro > total:
        return f"per_device_train_batch_size {micro} is more than the total batch of {total}: lower it to {total}"
    if accumulation != "auto" and accumulation > total:
        return f"gradient_accumulation_steps {accumulation} is more than the total batch of {total} sequences"
    return None


def _heads(recipe: Recipe) -> str | None:
    settings = recipe.model_settings if isinstance(recipe.model_settings, dict) else {}
    width = recipe.hidden_size or settings.get("hidden_size") or settings.get("n_embd")
    heads = recipe.num_attention_heads or settings.get("num_attention_heads") or settings.get("n_head")
    kv_heads = recipe.num_key_value_heads or settings.get("num_key_value_heads")
    if not all(value is None or isinstance(value, int) for value in (width, heads, kv_heads)):
        return None
    if heads and kv_heads and heads % kv_heads:
        return f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}: change one of them"
    if width and heads and width % heads and not settings.get("head_dim"):
        return f"hidden_size {width} is not a multiple of num_attention_heads {heads}: change one of them"
    return None


def _name(recipe: Recipe) -> str | None:
    if recipe.name.strip(" .") and not set(recipe.name) & set('<>:"/\\|?*'):
        return None
    return f"name {recipe.name!r} cannot name a folder on every system: use letters, digits, - and _"


def _device(recipe: Recipe) -> str | None:
    kind, colon, index = recipe.device.partition(":")
    if recipe.device in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isdigit()):
        return None
    return f"device {recipe.device!r} is unknown: use auto, cpu, cuda or cuda:N"


def _stopping(recipe: Recipe) -> str | None:
    if recipe.early_stopping_patience and recipe.eval_fraction == 0 and not recipe.eval_dataset:
        return "early_stopping_patience needs held-out text: set eval_fraction above 0, or eval_dataset"
    return None


def _scheduler(recipe: Recipe) -> str | None:
    known = ("cosine", "wsd", "linear", "constant")
    if recipe.lr_scheduler_type not in known and ":" not in recipe.lr_scheduler_type:
        return (
            f"lr_scheduler_type {recipe.lr_scheduler_type!r} is unknown: use {', '.join(known)}, "
            "or module:function, a function of progress from 0 to 1 that returns a share of the peak rate"
        )
    return None


_CHECKS = (_name, _duration, _warmup, _total_batch, _heads, _device, _stopping, _scheduler)
