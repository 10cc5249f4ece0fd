"""A plan becomes a model in training."""

import torch
from torch import nn
from transformers import PreTrainedModel

from onecard.model.adapt import adapt
from onecard.model.build import build_model
from onecard.model.decoder import Decoder
from onecard.model.loss import find_head
from onecard.spec import Plan
from onecard.training.optimizer import Optimizer
from onecard.training.state import LossScale, Progress, TrainState

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def assemble(plan: Plan) -> TrainState:
    """Builds model, optimizer and state as the plan says, at step 0, on its device.

    Weights depend on the seed alone, not on the device: they are drawn on the CPU.

    Raises:
        InputError: the model cannot be built or adapted, or its logits are not those of a plain head.
    """
    device = torch.device(plan.device)
    model = build_model(
        plan.model.settings,
        dropout=plan.model.dropout,
        init=plan.model.init,
        seed=plan.seed,
        backend=plan.attn_implementation,
    )
    adapt(model, plan.adapt, seed=plan.seed, device=device)
    masters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    for tensor in (*model.parameters(), *model.buffers()):
        # Only parameters change their type: rotary frequencies and weights in 4 bits are buffers.
        dtype = DTYPES[plan.precision] if isinstance(tensor, nn.Parameter) else tensor.dtype
        # By `data`, because `Module.to` swaps tensors, which fake ones refuse.
        tensor.data = tensor.data.to(device, dtype)
    model.train()
    if plan.gradient_checkpointing:
        _checkpoint_activations(model)
    optimizer = Optimizer(model, plan.optimizer)
    optimizer.load_masters(masters)
    return TrainState(
        plan=plan,
        model=model,
        decoder=Decoder(model, compiled=plan.torch_compile),
        head=find_head(model),
        optimizer=optimizer,
        loss_scale=LossScale.make(plan.precision, device),
        progress=Progress(),
    )


def _checkpoint_activations(model: PreTrainedModel) -> None:
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # its name before transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
