"""One optimizer for a model: fp32 masters, AdamW for vectors and embeddings, Muon or AdamW for matrices.

PyTorch's fused AdamW is the only one: it needs no temporary memory, runs on every device that onecard knows, and leaves
a step out where the device says so.

    model parameters (bf16 / fp16) ──gradient──► fp32 gradient of the master      summed over micro-batches
            ▲                                             │ clip, update
            └────────────── cast ◄──────────────── fp32 master

In fp32 a parameter is its own master and nothing is copied.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onecard.spec import OptimizerPlan
from onecard.training.adamw_8bit import AdamW8bit, can_rest_in_8_bits
from onecard.training.muon import Muon, RowParts
from onecard.training.paged import PageableZeros


class Optimizer:
    """Owns the fp32 masters of a model's trainable parameters, their gradients and moments.

    All moments and the scratch of Muon exist from the start; that of 8-bit moments is claimed before an update, which
    thus is applied whole or not at all. `parts`: how ranks share parameters that each has in part.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: OptimizerPlan,
        compute_dtype: torch.dtype | None = None,
        parts: RowParts | None = None,
    ) -> None:
        self.plan = plan
        self._parts = parts
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: _master_of(parameter) for name, parameter in self._parameters.items()}
        self._master_of_id = {id(p): self.masters[name] for name, p in self._parameters.items()}
        self._keeps_gradients = False
        self._is_in_parts = any(isinstance(parameter, DTensor) for parameter in self._parameters.values())
        self._is_mixed = not self._is_in_parts and any(self.masters[n] is not p for n, p in self._parameters.items())
        if self._is_mixed:
            for name, parameter in self._parameters.items():
                parameter.register_post_accumulate_grad_hook(_move_gradient_to(self.masters[name]))
        self._zeros = PageableZeros(is_paged=plan.is_paged)
        matrices = _matrix_names(model) if plan.name == "muon" else {}
        dtype = compute_dtype or next(iter(self._parameters.values())).dtype
        self._muon = self._make_muon(matrices, dtype) if matrices else None
        in_8_bits = self._names_in_8_bits(model) if plan.is_8bit else []
        self._adamw_8bit = (
            AdamW8bit([self.masters[name] for name in in_8_bits], plan, self._zeros) if in_8_bits else None
        )
        taken = {*matrices, *in_8_bits}
        self._adamw = self._make_adamw([name for name in self.masters if name not in taken])

    def _make_muon(self, matrices: dict[str, bool], dtype: torch.dtype) -> Muon:
        masters = [self.masters[name] for name in matrices]
        # The iteration bears bf16 (Jordan et al.); fp16 would overflow in it.
        compute_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        return Muon(
            masters,
            list(matrices.values()),
            momentum=self.plan.muon_momentum,
            compute_dtype=compute_dtype,
            num_rows=[len(self._parameters[name]) for name in matrices],
            parts=self._parts,
        )

    def _names_in_8_bits(self, model: PreTrainedModel) -> list[str]:
        # Rows of rare tokens share blocks with rows of frequent ones, beside which theirs vanish (arXiv 2110.02861
        # keeps embeddings in 32 bits for it, and so does transformers' Trainer).
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        return [
            name
            for name, parameter in self._parameters.items()
            if id(parameter) not in embeddings and can_rest_in_8_bits(parameter)
        ]

    def _make_adamw(self, names: list[str]) -> torch.optim.AdamW | None:
        if not names:
            return None
        decayed = [self.masters[name] for name in names if self.masters[name].ndim >= 2]
        others = [self.masters[name] for name in names if self.masters[name].ndim < 2]
        adamw = torch.optim.AdamW(
            [group for group in ({"params": decayed}, {"params": others, "weight_decay": 0.0}) if group["params"]],
            lr=self.plan.learning_rate,
            betas=(self.plan.adam_beta1, self.plan.adam_beta2),
            eps=self.plan.adam_epsilon,
            weight_decay=self.plan.weight_decay,
            fused=True,
        )
        for group in adamw.param_groups:
            for master in group["params"]:
                adamw.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32, device=master.device),
                    "exp_avg": self._zeros(master.shape, master.dtype, master.device),
                    "exp_avg_sq": self._zeros(master.shape, master.dtype, master.device),
                }
        return adamw

    def gradient_of(self, parameter: Tensor) -> Tensor | None:
        """The fp32 gradient of a parameter, to be added to, zeros where there is none yet; None for one that rests."""
        master = self._master_of_id.get(id(parameter))
        if master is not None and master.grad is None:
            master.grad = torch.zeros_like(master)
        return None if master is None else master.grad

    def master_of(self, parameter: Tensor) -> Tensor:
        """The fp32 master of a trainable parameter."""
        return self._master_of_id[id(parameter)]

    @property
    def is_mixed(self) -> bool:
        """Whether parameters are 16-bit copies of their masters."""
        return self._is_mixed

    def take_parts(self) -> None:
        """Hands the masters of sharded parameters the parts of the gradients that are this rank's."""
        for name, parameter in self._parameters.items():
            if isinstance(parameter.grad, DTensor):
                self.masters[name].grad = parameter.grad.to_local()

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients together, 0-d fp32."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._gradients())))

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiplies all gradients by a 0-d tensor."""
        torch._foreach_mul_(self._gradients(), factor)

    def claim_scratch(self) -> None:
        """Makes sure of the memory that `step` takes; to be called when all else of a step is freed.

        Where it runs out here, nothing has been updated.
        """
        if self._adamw_8bit is not None:
            self._adamw_8bit.claim_scratch()

    @torch.no_grad()
    def step(self, learning_rate: float, is_finite: Tensor) -> None:
        """Updates masters and model; leaves both and all moments untouched where `is_finite` (0-d bool) is false.

        `learning_rate` is AdamW's; Muon's follows in the plan's ratio.
        """
        if self._adamw is not None:
            # The fused kernel skips the update where `found_inf` is one: the protocol of torch.amp.GradScaler.
            self._adamw.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            self._adamw.step()
        if self._adamw_8bit is not None:
            self._adamw_8bit.step(learning_rate, is_finite)
        if self._muon is not None:
            muon_rate = learning_rate * self.plan.muon_learning_rate / self.plan.learning_rate
            self._muon.step(muon_rate, self.plan.weight_decay, is_finite)
        if self._is_mixed:
            torch._foreach_copy_(list(self._parameters.values()), list(self.masters.values()))

    def keep_gradients(self) -> None:
        """Lets gradients stay where they are, as zeros: buckets that they are views of would otherwise lie idle."""
        self._keeps_gradients = True

    def zero_grad(self) -> None:
        """Drops all gradients: the next backward pass then hands over its own tensors instead of adding to zeros."""
        if self._keeps_gradients:
            torch._foreach_zero_(self._gradients())
            return
        for master in self.masters.values():
            master.grad = None
        if self._is_in_parts:
            for parameter in self._parameters.values():
                parameter.grad = None

    def forget_gradients(self) -> None:
        """Drops all gradients, those too that a backward pass which broke off has left on the way to their masters."""
        self.zero_grad()
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """All moments by name, sharing memory with the optimizer: loading copies into them."""
        return dict(self._named_state())

    def constant_tensors(self) -> list[Tensor]:
        """What lies on the device for the updates and is the same in every run."""
        own = (self._adamw_8bit, self._muon)
        return [tensor for part in own if part is not None for tensor in part.constants()]

    def paged_tensors(self) -> list[Tensor]:
        """State that rests in host memory and comes to the device page by page; on a CPU, what would."""
        return self._zeros.paged

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores moments bit for bit from what `state_tensors` gave."""
        for name, own in self._named_state():
            own.copy_(tensors[name])

    def load_masters(self, tensors: dict[str, Tensor]) -> None:
        """Restores masters, and with them the model, from tensors named as the model's parameters."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[name])
                self._parameters[name].copy_(master)

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        names = {id(master): name for name, master in self.masters.items()}
        if self._adamw_8bit is not None:
            for master, key, value in self._adamw_8bit.state_of():
                yield f"adamw.{names[id(master)]}.{key}", value
        if self._adamw is not None:
            for master, state in self._adamw.state.items():
                for key, value in state.items():
                    yield f"adamw.{names[id(master)]}.{key}", value
        if self._muon is not None:
            for masters, momentum in self._muon.buffers():
                for master, own in zip(masters, momentum.unbind(), strict=True):
                    yield f"muon.{names[id(master)]}.momentum", own

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self.masters.values() if master.grad is not None]


def _master_of(parameter: nn.Parameter) -> Tensor:
    if isinstance(parameter, DTensor):
        part: Tensor = cast(DTensor, parameter.detach()).to_local()  # the memory of the part itself
        return part
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_()


def _move_gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        # The 16-bit gradient is freed as soon as it is counted, so never more than one layer's is alive.
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return move


def _matrix_names(model: PreTrainedModel) -> dict[str, bool]:
    """Names of the matrices inside the layers; the value says whether the matrix is stored [in, out]."""
    prefix = f"{model.base_model_prefix}."
    modules: dict[str, Any] = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | Conv1D)
    }
    return {name: isinstance(module, Conv1D) for name, module in modules.items() if module.weight.requires_grad}
