"""The compiler's own programs for a card, run on tensors without storage where there is no card.

    decoder ─ Dynamo ─► graph ─ AOTAutograd, min-cut ─► forward, backward ─ Inductor, Triton ─► Python with
                                                                                                kernels in it
    that Python text ─► executed: its allocations, `del`s and matrix products are real calls, its kernels only count

Inductor writes for each graph a function that allocates buffers, calls kernels and drops what is not needed any more.
It is the schedule itself, with fusion, reuse of buffers and recomputation decided, and can be executed on fake tensors
once the fused kernels are replaced by something that looks at their arguments. So a compiled step needs no model of
its own: whoever records operators sees it as it sees an eager step. Inductor's Triton code generator is run for fake
CPU tensors, which needs neither Triton nor a GPU. These are private interfaces, so other versions of PyTorch than those
tried are refused.
"""

import ast
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from onecard.model.attention import DocumentBorders
from onecard.model.decoder import Decoder

# Calls of one fused kernel: its tensors, read or written.
OnKernel = Callable[[list[Tensor]], None]

_KNOWN_VERSIONS = {(2, 13)}
# Inductor's answers come from its caches otherwise, without a program to look at.
# On a card it tries products of odd sizes with and without padding; at the sizes of training padding wins.
_SETTINGS: dict[str, Any] = {
    "cpu_backend": "triton",
    "force_shape_pad": True,
    "fx_graph_cache": False,
    "fx_graph_remote_cache": False,
    "graph_partition": False,
}


class CannotTraceCompiled(Exception):
    """The compiler's program cannot be had here; a result, not a mistake.

    Without checkpointing an eager trace bounds the step from above; with it, compiled steps of small models were
    traced up to 15 % larger than eager ones.
    """


@contextmanager
def compiling_for_card(on_kernel: OnKernel) -> Iterator[None]:
    """Lets `torch.compile` make programs that only allocate and count, for fake tensors.

    Inside the block every earlier result of the compiler in this process is forgotten, and afterwards those made
    inside. `on_kernel` is called with the tensors of each fused kernel whenever it would run.

    Raises:
        CannotTraceCompiled: this PyTorch's compiler is not one of the known ones.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version not in _KNOWN_VERSIONS:
        known = ", ".join(".".join(map(str, known)) for known in sorted(_KNOWN_VERSIONS))
        raise CannotTraceCompiled(f"the compiler of PyTorch {torch.__version__} is not known, only that of {known}")
    with ExitStack() as stack:
        try:
            _redirect(stack, on_kernel)
        except (ImportError, AttributeError) as error:
            raise CannotTraceCompiled(f"the compiler of PyTorch {torch.__version__} has changed: {error}") from error
        yield


def compile_ahead(decoder: Decoder, ids_BT: Tensor, borders: DocumentBorders | None) -> None:
    """Compiles forward and backward of a decoder for a batch of this shape; leaves no gradients.

    Raises:
        CannotTraceCompiled: the compiler failed.
    """
    # Whatever goes wrong inside the compiler means that there is no program, and nothing else.
    try:
        hidden_ND = decoder(ids_BT, borders)
        leaves = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        torch.autograd.grad(hidden_ND, leaves, torch.empty_like(hidden_ND), allow_unused=True)
    except Exception as error:
        raise CannotTraceCompiled(f"the compiler failed: {error}") from error


def _redirect(stack: ExitStack, on_kernel: OnKernel) -> None:
    import torch._inductor.config as settings
    from torch._inductor.fx_passes import pad_mm
    from torch._inductor.graph import GraphLowering
    from torch.utils import _triton

    def load(graph: Any) -> ModuleType:
        text, _ = graph.codegen()
        return _load(text.value, on_kernel)

    lower = GraphLowering.run

    def run(graph: Any, *arguments: Any) -> Any:
        # On a CPU, masks of attention would be written out for every head.
        with mock.patch.object(FakeTensor, "is_cuda", True):
            return lower(graph, *arguments)

    torch._dynamo.reset()
    stack.callback(torch._dynamo.reset)
    stack.enter_context(settings.patch(_SETTINGS))
    stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", load))
    stack.enter_context(mock.patch.object(GraphLowering, "run", run))
    # On a CPU, a kernel would get a tensor without dimensions (the offset of quantized scales) as a number read out.
    stack.enter_context(mock.patch.object(GraphLowering, "is_unspec_arg", return_value=False))
    for question in ("check_device", "has_triton"):
        stack.enter_context(mock.patch.object(pad_mm, question, return_value=True))
    # Names Triton's version in kernels that nobody will compile.
    stack.enter_context(mock.patch.object(_triton, "triton_hash_with_backend", return_value=""))


def _load(text: str, on_kernel: OnKernel) -> ModuleType:
    """Makes a module of Inductor's program without the kernels in it."""
    from torch._inductor.select_algorithm import extern_kernels

    # A card repeats random numbers by a generator's state, which lies outside its memory.
    for name in ("run_and_save_rng_state", "run_with_rng_state"):
        text = text.replace(f"torch.ops.higher_order.{name}(", f"{name}(")
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    module = ModuleType("program")
    module.__file__ = "program"
    names = vars(module)
    names.update(torch=torch, math=math, inf=math.inf, nan=math.nan, device=torch.device)
    names.update(empty_strided=torch.empty_strided, extern_kernels=extern_kernels)
    names["AsyncCompile"] = lambda: _Kernels(on_kernel)
    exec(compile(tree, "program", "exec"), names)
    names.update(
        assert_size_stride=_ignore,
        assert_alignment=_ignore,
        empty_strided_cpu=lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        reinterpret_tensor=_reinterpret,
        run_and_save_rng_state=lambda call, *arguments, **named: (torch.empty(0), call(*arguments, **named)),
        run_with_rng_state=lambda _, call, *arguments, **named: call(*arguments, **named),
    )
    return module


class _Kernels:
    """Stands for Inductor's `AsyncCompile`: makes kernels that report their tensors."""

    def __init__(self, on_kernel: OnKernel) -> None:
        self._on_kernel = on_kernel

    def triton(self, *_: Any, **__: Any) -> "_Kernel":
        return _Kernel(self._on_kernel)

    def wait(self, _: Any) -> None:
        """Nothing is being compiled."""


class _Kernel:
    def __init__(self, on_kernel: OnKernel) -> None:
        self._on_kernel = on_kernel

    def run(self, *arguments: Any, **_: Any) -> None:
        self._on_kernel([argument for argument in arguments if isinstance(argument, Tensor)])


def _reinterpret(tensor: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _ignore(*_: Any) -> None:
    pass
