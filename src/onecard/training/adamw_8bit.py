"""AdamW whose moments rest in 8 bits, in blocks of 256 values that share a scale (arXiv 2110.02861).

    exp_avg     uint8, one fp32 scale per block ──dequantize──► fp32 ─┐            at most `_RUN_ELEMENTS`
    exp_avg_sq  uint8, one fp32 scale per block ──dequantize──► fp32 ─┤ fused AdamW  of them exist at a time
         ▲                                                            │
         └──────────────────── quantize, where the step is finite ◄───┘

The moments of all matrices lie one behind the other, so that one kernel serves many small ones. Of bitsandbytes only
the quantization is used, around PyTorch's fused kernel: its own fused update is told the number of the step by the
host, zeroes moments where a gradient is not finite, and so cannot leave a step out that is refused on the device. A GPU
and a CPU run the same code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.model.nf4 import dynamic_codebook, load_operators
from onecard.spec import OptimizerPlan
from onecard.training.paged import Zeros

# bitsandbytes' own sizes: values per scale, and the smallest tensor that is worth it.
_BLOCK = 256
_LEAST_ELEMENTS = 4096
# 2M values take 20 MiB while they are updated; kernels of this size fill every card.
_RUN_ELEMENTS = 1 << 21


def can_rest_in_8_bits(master: Tensor) -> bool:
    """Whether a tensor is large enough to be worth it: a matrix of 4096 values, as in bitsandbytes.

    Vectors never are: they are few, and the gains of norms move together.
    """
    return master.ndim >= 2 and master.numel() >= _LEAST_ELEMENTS


class _Moment:
    """One moment of all matrices: values in 8 bits [N], scales fp32 [N / 256], and what the 256 codes stand for."""

    def __init__(self, num_elements: int, *, is_signed: bool, device: torch.device, zeros: Zeros) -> None:
        self.values = zeros((num_elements,), torch.uint8, device)
        self.scales = torch.zeros(num_elements // _BLOCK, device=device)
        self.codebook = torch.tensor(dynamic_codebook(is_signed=is_signed), device=device)

    def dequantize(self, start: int, stop: int) -> Tensor:
        scales = self.scales[start // _BLOCK : stop // _BLOCK]
        moment: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            self.values[start:stop], scales, self.codebook, _BLOCK, torch.float32
        )
        return moment

    def quantize(self, start: int, moment: Tensor, is_finite: Tensor) -> None:
        """Puts a moment back. A block does not survive quantization twice bit for bit, so a refused one is kept."""
        values, scales = torch.ops.bitsandbytes.quantize_blockwise(moment, self.codebook, _BLOCK)
        stop = start + moment.numel()
        for fresh, own in (
            (values, self.values[start:stop]),
            (scales, self.scales[start // _BLOCK : stop // _BLOCK]),
        ):
            torch.where(is_finite, fresh, own, out=own)


@dataclass(frozen=True)
class _Piece:
    """Elements `first` and following of a matrix, whose moments begin at `start`, and its count of steps."""

    master: Tensor
    step: Tensor
    first: int
    num_elements: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + _padded(self.num_elements)

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor shaped as the matrix."""
        return tensor.reshape(-1)[self.first : self.first + self.num_elements]


class AdamW8bit:
    """AdamW over fp32 matrices with moments in 8 bits: 2.03 bytes of state per value instead of 8."""

    def __init__(self, masters: Sequence[Tensor], plan: OptimizerPlan, zeros: Zeros) -> None:
        load_operators(f"optim {plan.name}", "optim adamw")
        self._plan = plan
        device = masters[0].device
        self._pieces = list(_cut(masters, torch.zeros(len(masters), device=device).unbind()))
        num_elements = self._pieces[-1].stop
        self._longest_run = min(_RUN_ELEMENTS, num_elements)
        self._exp_avg = _Moment(num_elements, is_signed=True, device=device, zeros=zeros)
        self._exp_avg_sq = _Moment(num_elements, is_signed=False, device=device, zeros=zeros)

    def claim_scratch(self) -> None:
        """Takes what an update of the longest run takes, and leaves it in the cache of PyTorch's allocator.

        bitsandbytes' operators make their own results, so no memory can be held for them; where there is no room, it
        runs out here, before anything is updated.
        """
        size, device = self._longest_run, self._exp_avg.values.device
        kinds = ((size, torch.float32), (size, torch.float32), (size, torch.uint8), (size // _BLOCK, torch.float32))
        _ = [torch.empty(length, dtype=dtype, device=device) for length, dtype in kinds]

    @torch.no_grad()
    def step(self, learning_rate: float, is_finite: Tensor) -> None:
        """Applies one update from the matrices' `.grad`; none where `is_finite` (0-d bool) is false.

        A matrix without a gradient is left as it is, as in PyTorch's AdamW.
        """
        steps = [piece.step for piece in self._pieces if piece.first == 0 and piece.master.grad is not None]
        torch._foreach_add_(steps, [is_finite.float()] * len(steps))
        found_inf = (~is_finite).float()
        for run in self._runs():
            self._update(run, learning_rate, is_finite, found_inf)

    def state_of(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Each matrix with the parts of its state and their names, in the memory of the optimizer."""
        for master, first, last in self._matrices():
            for name, moment in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq)):
                yield master, name, moment.values[first.start : last.stop]
                yield master, f"{name}_scale", moment.scales[first.start // _BLOCK : last.stop // _BLOCK]
            yield master, "step", first.step

    def constants(self) -> list[Tensor]:
        """What lies on the device beside the state."""
        return [self._exp_avg.codebook, self._exp_avg_sq.codebook]

    def _matrices(self) -> Iterator[tuple[Tensor, _Piece, _Piece]]:
        first = self._pieces[0]
        for piece, following in zip(self._pieces, [*self._pieces[1:], None], strict=True):
            if piece.first == 0:
                first = piece
            if following is None or following.first == 0:
                yield piece.master, first, piece

    def _runs(self) -> Iterator[list[_Piece]]:
        """Neighbours that have a gradient, so many that their moments can be whole for a while."""
        run: list[_Piece] = []
        for piece in self._pieces:
            has_gradient = piece.master.grad is not None
            if run and (not has_gradient or piece.stop - run[0].start > _RUN_ELEMENTS):
                yield run
                run = []
            if has_gradient:
                run.append(piece)
        if run:
            yield run

    def _update(self, run: list[_Piece], learning_rate: float, is_finite: Tensor, found_inf: Tensor) -> None:
        start, stop = run[0].start, run[-1].stop
        exp_avg, exp_avg_sq = (moment.dequantize(start, stop) for moment in (self._exp_avg, self._exp_avg_sq))
        spans = [(piece.start - start, piece.start - start + piece.num_elements) for piece in run]
        torch._fused_adamw_(
            [piece.of(piece.master) for piece in run],
            [piece.of(piece.master.grad) for piece in run if piece.master.grad is not None],
            [exp_avg[low:high] for low, high in spans],
            [exp_avg_sq[low:high] for low, high in spans],
            [],
            [piece.step for piece in run],
            lr=learning_rate,
            beta1=self._plan.adam_beta1,
            beta2=self._plan.adam_beta2,
            weight_decay=self._plan.weight_decay,
            eps=self._plan.adam_epsilon,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
        self._exp_avg.quantize(start, exp_avg, is_finite)
        self._exp_avg_sq.quantize(start, exp_avg_sq, is_finite)


def _cut(masters: Sequence[Tensor], steps: Sequence[Tensor]) -> Iterator[_Piece]:
    start = 0
    for master, step in zip(masters, steps, strict=True):
        for first in range(0, master.numel(), _RUN_ELEMENTS):
            piece = _Piece(master, step, first, min(_RUN_ELEMENTS, master.numel() - first), start)
            yield piece
            start = piece.stop


def _padded(num_elements: int) -> int:
    """No block holds values of two matrices."""
    return -(-num_elements // _BLOCK) * _BLOCK
