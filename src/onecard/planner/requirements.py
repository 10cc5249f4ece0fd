"""What a machine or a corpus must offer for a recipe to be honoured."""

from onecard.errors import DoesNotFitError, InputError
from onecard.hardware import Machine
from onecard.planner.device import Target, find_compiler_problem
from onecard.spec import CorpusFacts, ModelPlan, Recipe
from onecard.units import format_bytes, format_count

# bitsandbytes 0.50, system requirements: "SM60+ minimum" for NVIDIA GPUs, on Linux and Windows alike.
_LEAST_OF_4_BITS = (6, 0)


def check_compiler(recipe: Recipe, target: Target) -> None:
    """Refuses compiling that is asked for and cannot be had."""
    if recipe.torch_compile is True and (problem := find_compiler_problem(target)):
        raise InputError(f"torch_compile cannot be used: {problem}. Set torch_compile to auto or false")


def check_quantizing(recipe: Recipe, target: Target) -> None:
    """Refuses weights in 4 bits on a card for which bitsandbytes has no code; on a CPU they are computed, too."""
    if recipe.method == "qlora" and target.capability is not None and target.capability < _LEAST_OF_4_BITS:
        number, least = (".".join(map(str, one)) for one in (target.capability, _LEAST_OF_4_BITS))
        raise InputError(
            f"method qlora cannot be used on {target.name}: bitsandbytes, which quantizes to 4 bits, needs compute "
            f"capability {least} or newer (Pascal), and the card has {number}. Use method lora, or another card"
        )


def check_heldout(recipe: Recipe, corpus: CorpusFacts) -> None:
    """Refuses early stopping without text to stop by."""
    if recipe.early_stopping_patience and not corpus.num_heldout_tokens:
        raise InputError("early_stopping_patience needs held-out text: set eval_fraction above 0, or eval_dataset")


def check_blocks(recipe: Recipe, corpus: CorpusFacts) -> None:
    """Refuses a source that does not fill a block by itself: a block never mixes sources."""
    if corpus.is_estimate or recipe.task == "sft":  # chats fill as many rows as they need
        return
    sources = corpus.tokens_of_sources or (("", corpus.num_train_tokens),)
    for path, num_tokens in sources:
        if num_tokens <= recipe.max_seq_length:
            text = f"source {path!r}" if path else "the training text"
            raise InputError(
                f"{text} has {num_tokens} tokens to train on, fewer than one block of max_seq_length "
                f"{recipe.max_seq_length}: give more text, or lower max_seq_length"
            )


def check_ram(recipe: Recipe, model: ModelPlan, machine: Machine) -> None:
    """Refuses a model whose fp32 weights, gradients and optimizer state are more than the free memory."""
    of_moments = {"muon": 4, "adamw_8bit": 2}.get(recipe.optim, 8)
    # 4-bit weights rest in half a byte; embeddings and what quantizing leaves behind come on top (1.3 measured).
    bytes_per_parameter = {"full": 4 + 4 + of_moments, "lora": 4, "qlora": 1.5}[recipe.method]
    needed = int(model.num_parameters * bytes_per_parameter)
    if needed > machine.free_ram_bytes:
        raise DoesNotFitError(
            f"a model of {format_count(model.num_parameters)} parameters needs {format_bytes(needed)} for weights, "
            f"gradients and optimizer state, and {format_bytes(machine.free_ram_bytes)} of memory are free: "
            "make it narrower or shallower, or close other programs"
        )
