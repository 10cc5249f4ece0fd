"""A plan becomes a model in training."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.errors import InputError
from onecard.model.adapt import adapt
from onecard.model.build import build_hollow, build_model, finish, make_config
from onecard.model.decoder import Decoder
from onecard.model.loss import find_head
from onecard.model.pretrained import load_pretrained, make_hollow
from onecard.spec import Plan
from onecard.training.optimizer import Optimizer
from onecard.training.state import LossScale, Progress, TrainState

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def assemble(plan: Plan, *, with_weights: bool = True) -> TrainState:
    """Builds model, optimizer and state as the plan says, at step 0, on its device.

    Weights from scratch depend on the seed alone, not on the device: they are drawn on the CPU. `with_weights` false
    reads none of an existing model, whose shape is enough for a trace.

    Raises:
        InputError: the model cannot be built or adapted, or its logits are not those of a plain head.
        CheckpointError: the weights of an existing model are missing, damaged or others than when it was planned.
    """
    device, base = torch.device(plan.device), plan.model.base
    model = _build(plan, with_weights)
    adapt(model, plan.adapt, seed=plan.seed, device=device, tokens=plan.model.learned_tokens)
    masters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    for tensor in (*model.parameters(), *model.buffers()):
        # Only parameters change their type: rotary frequencies and weights in 4 bits are buffers.
        dtype = DTYPES[plan.precision] if isinstance(tensor, nn.Parameter) else tensor.dtype
        # By `data`, because `Module.to` swaps tensors, which fake ones refuse. Loaded weights may be the file itself.
        tensor.data = tensor.data.to(device, dtype, copy=base is not None and with_weights)
    model.train()
    if plan.gradient_checkpointing:
        _checkpoint_activations(model, plan.gradient_checkpointing)
    state = _as_state(plan, model)
    state.optimizer.load_masters(masters)
    return state


def assemble_hollow(plan: Plan) -> TrainState:
    """Builds what `assemble` does without weights and moments, which ranks are yet to hold in parts (`sharded.py`).

    Buffers are on the device; parameters, and all that the optimizer has of them, are on the meta device.

    Raises:
        InputError, CheckpointError: as `assemble`, of what can be told without weights.
    """
    device, given = torch.device(plan.device), plan.model
    if given.init == "pretrained":
        model = make_hollow(given, backend=plan.attn_implementation)
    else:
        config = make_config(given.settings, given.dropout)
        model = finish(build_hollow(config, plan.attn_implementation), given.dropout)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    model.train()
    if plan.gradient_checkpointing:
        _checkpoint_activations(model, plan.gradient_checkpointing)
    return _as_state(plan, model)


def initial_weights(plan: Plan) -> dict[str, Tensor]:
    """The weights that a run begins with, whole on the host: parameters by name, and buffers that are saved.

    Raises:
        InputError, CheckpointError: as `assemble`.
    """
    return weights_of(_build(plan, with_weights=True))


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters by name, and buffers that are saved with them."""
    named = dict(model.named_parameters()) | saved_buffers(model)
    return {name: tensor.detach() for name, tensor in named.items()}


def saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers that belong to a model's weights, such as the biases by which some families choose experts."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _as_state(plan: Plan, model: PreTrainedModel) -> TrainState:
    return TrainState(
        plan=plan,
        model=model,
        decoder=Decoder(model, compiled=plan.torch_compile),
        head=find_head(model, plan.loss_chunk_size),
        optimizer=Optimizer(model, plan.optimizer),
        loss_scale=LossScale.make(plan.precision, torch.device(plan.device)),
        progress=Progress(),
    )


def start_again(state: TrainState) -> None:
    """Puts a state back to step 0 of its plan, in place: weights as they were drawn or loaded, no moments."""
    # On the CPU, where initial weights are drawn anyway: the device has no room for a second model.
    fresh = assemble(state.plan.model_copy(update={"device": "cpu", "torch_compile": False}))
    with torch.no_grad():
        state.optimizer.load_masters(fresh.optimizer.masters)
        state.optimizer.load_state_tensors(fresh.optimizer.state_tensors())
        state.loss_scale.value.copy_(fresh.loss_scale.value)
        state.loss_scale.num_good_steps.copy_(fresh.loss_scale.num_good_steps)
    state.progress = fresh.progress


def adopt(state: TrainState, plan: Plan) -> None:
    """Lets a state follow a plan that differs in how much of a step or an evaluation exists at once."""
    if plan.gradient_checkpointing and plan.gradient_checkpointing != state.plan.gradient_checkpointing:
        _checkpoint_activations(state.model, plan.gradient_checkpointing)
    if plan.loss_chunk_size != state.plan.loss_chunk_size:
        state.head = replace(state.head, chunk_size=plan.loss_chunk_size)
    state.plan = plan


def _build(plan: Plan, with_weights: bool) -> PreTrainedModel:
    model, backend = plan.model, plan.attn_implementation
    if model.init == "pretrained":
        return load_pretrained(model, seed=plan.seed, backend=backend, with_weights=with_weights)
    return build_model(model.settings, dropout=model.dropout, init=model.init, seed=plan.seed, backend=backend)


def _checkpoint_activations(model: PreTrainedModel, share: float) -> None:
    """Lets the first layers recompute: the backward pass lets go of what the last ones keep before it gets there."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # its name before transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if share == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"gradient_checkpointing {share:g}: {model.config.model_type} recomputes all of its layers or none; "
            "use true or false"
        )
    for layer in layers[max(1, round(share * len(layers))) :]:
        layer.gradient_checkpointing = False
