"""Which device, and what it can do."""

import os
import re
import sys
from dataclasses import dataclass, replace

import torch

from onecard.distributed.place import find_place
from onecard.errors import InputError
from onecard.hardware import Card, CardHost, Machine, all_cards, card_of, usable_bytes
from onecard.model.build import make_config
from onecard.model.families import explain_backend, find_backend
from onecard.planner.allocator_settings import AllocatorSettings
from onecard.planner.communication import NCCL_BYTES
from onecard.spec import CardGroup, ModelPlan, Recipe
from onecard.units import GIB

_HOSTS: dict[str, CardHost] = {
    "linux": "linux-desktop",
    "linux-desktop": "linux-desktop",
    "linux-headless": "linux-headless",
    "windows": "windows",
    "wsl": "wsl",
}
# Triton compiles for nothing older (is_triton_capable in PyTorch 2.13's torch/_dynamo/device_interface.py).
_LEAST_OF_TRITON = (7, 0)
_WHEELS = "https://pytorch.org/get-started/locally/"
_INDEX = "https://download.pytorch.org/whl"
# What `pip install torch` brings on Linux; taken where this PyTorch is one without CUDA.
_USUAL_BUILD = "cu130"
# For cards older than Turing.
_OLDER_BUILD = "cu126"
_CODE = re.compile(r"(sm|compute)_(\d+)(\d)[af]?")


def choose_device(wish: str, machine: Machine) -> tuple[str, str]:
    """Resolves `auto`, `cpu`, `cuda` or `cuda:N` to a device and the reason for it.

    Raises:
        InputError: the device is unknown, absent, or out of reach of the installed PyTorch.
    """
    if wish == "cpu":
        return "cpu", "asked for"
    if wish == "auto":
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name(0)
            if problem := _missing_code(0):
                return "cpu", f"{name} is there, but {problem}"
            return "cuda:0", f"{name} is there"
        if machine.gpus:
            return "cpu", f"{machine.gpus[0].name} is there, but {_torch_problem()}"
        return "cpu", "no NVIDIA GPU found"
    kind, _, index = wish.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise InputError(f"device {wish!r} is unknown: use auto, cpu, cuda or cuda:0, cuda:1 ...")
    if not torch.cuda.is_available():
        cause = _torch_problem() if machine.gpus else "no NVIDIA GPU was found on this machine"
        raise InputError(f"device {wish} cannot be used: {cause}. Use --device cpu, or see {_WHEELS}")
    if int(index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {wish} does not exist: PyTorch sees {torch.cuda.device_count()} GPU(s), counted from 0"
        )
    if problem := _missing_code(int(index or 0)):
        raise InputError(f"device {wish} cannot be used: {problem}. Or use --device cpu")
    return f"cuda:{int(index or 0)}", "asked for"


def kind_of(device: str) -> str:
    """`cpu` or `cuda`, without the number."""
    return device.partition(":")[0]


@dataclass(frozen=True)
class Target:
    """What a plan is for: a device of this machine, or a card of the catalogue that need not be here.

    All figures are of one card; `group` says how many share the run, None where it is this one alone. On a CPU there is
    no `capability`, `card` and `limit_bytes`. The card of this machine may be unknown to the
    catalogue: then its memory is known, its rates are not. `limit_bytes` of its `total_bytes` is what PyTorch's
    allocator may reserve.
    """

    device: str
    reason: str
    name: str = "CPU"
    capability: tuple[int, int] | None = None
    card: Card | None = None
    host: CardHost = "linux-headless"
    limit_bytes: int | None = None
    total_bytes: int | None = None
    is_here: bool = True
    # Why PyTorch as it comes would not run there.
    problem: str | None = None
    group: CardGroup | None = None

    @property
    def num_ranks(self) -> int:
        return 1 if self.group is None else self.group.num

    @property
    def kind(self) -> str:
        return kind_of(self.device)

    @property
    def allocator_platform(self) -> str:
        """The platform as `AllocatorSettings` asks for it; inside WSL that is PyTorch for Linux."""
        return "win32" if self.host == "windows" else "linux"


def find_target(wish: str, machine: Machine, group: CardGroup | None = None) -> Target:
    """Describes the device of this machine that `device` names, and how many share the run: `group`, else as started.

    Raises:
        InputError: as `choose_device`.
    """
    device, reason = choose_device(wish, machine)
    group = group or _group_here()
    if kind_of(device) == "cpu":
        return Target(device, reason, group=group)
    index = int(device.partition(":")[2])
    properties = torch.cuda.get_device_properties(index)
    gpu = next((gpu for gpu in machine.gpus if gpu.uuid.removeprefix("GPU-") == str(properties.uuid)), None)
    card = card_of(gpu) if gpu is not None else None
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    # The context of this process exists by now, so what is free is the allocator's.
    limit = free_bytes if card is None else min(free_bytes, usable_bytes(card, _host_of(machine)))
    capability = torch.cuda.get_device_capability(index)
    host = _host_of(machine)
    return Target(device, reason, properties.name, capability, card, host, limit, total_bytes, group=group)


def _group_here() -> CardGroup | None:
    place = find_place()
    return CardGroup(num=place.num_ranks, per_machine=place.num_local_ranks) if place.num_ranks > 1 else None


def target_of_card(card: Card, platform: str | None = None, group: CardGroup | None = None) -> Target:
    """A card of the catalogue in a machine of this kind: linux (the default; a desktop), linux-headless, windows, wsl.

    With a `group` it is one of so many.

    Raises:
        InputError: another platform.
    """
    host = _HOSTS.get(platform or "linux")
    if host is None:
        raise InputError(f"platform {platform!r} is unknown: use linux (a desktop), linux-headless, windows or wsl")
    limit = usable_bytes(card, host)
    problem = _find_build_problem(card)
    reason = f"a plan for {card.name}" + (f"; {problem}" if problem else "")
    total = card.visible_bytes or card.memory_bytes
    return Target("cuda:0", reason, card.name, card.compute_capability, card, host, limit, total, False, problem, group)


def offered_bytes(target: Target) -> int | None:
    """What PyTorch's allocator may reserve there by card and environment; None on a CPU.

    Raises:
        InputError: the environment holds settings that PyTorch refuses.
    """
    if target.limit_bytes is None or target.total_bytes is None:
        return target.limit_bytes
    # The run sets a share of its own, which overrides that of the environment.
    share = AllocatorSettings.from_environment(os.environ, target.allocator_platform).per_process_memory_fraction
    return min(target.limit_bytes, int(share * target.total_bytes))


def keep_reserve(target: Target, reserve_gb: float | None) -> Target:
    """Takes so many GiB from what the allocator may reserve, for the desktop and others; a CPU stays as it is."""
    if reserve_gb is None or target.limit_bytes is None:
        return target
    return replace(target, limit_bytes=max(0, target.limit_bytes - int(reserve_gb * GIB)))


def keep_for_nccl(target: Target) -> Target:
    """Takes what NCCL is assumed to need beside PyTorch's allocator, where several cards share a run."""
    if target.num_ranks == 1 or target.limit_bytes is None:
        return target
    return replace(target, limit_bytes=max(0, target.limit_bytes - NCCL_BYTES))


def _host_of(machine: Machine) -> CardHost:
    # A card of this machine is asked how much is free, so whether a desktop runs on it needs no guess.
    hosts: dict[str, CardHost] = {"windows": "windows", "wsl": "wsl"}
    return hosts.get(machine.platform, "linux-headless")


def choose_precision(recipe: Recipe, target: Target, machine: Machine) -> tuple[str, str]:
    """Resolves `precision` to what the device computes fast.

    Raises:
        InputError: the precision asked for does not exist on the device.
    """
    if target.capability is None:
        if recipe.precision == "fp16":
            raise InputError("precision fp16 is for GPUs; on a CPU use bf16 or fp32, or leave it on auto")
        if recipe.precision != "auto":
            return recipe.precision, "asked for"
        if machine.has_bf16_cpu:
            return "bf16", "this CPU multiplies bf16 matrices in hardware"
        return "fp32", "this CPU has no bf16 matrix instructions"
    has_bf16 = target.capability >= (8, 0)
    if recipe.precision == "bf16" and not has_bf16:
        raise InputError(f"{target.name} has no bf16 (it came with Ampere): use --precision fp16")
    if recipe.precision != "auto":
        return recipe.precision, "asked for"
    return (
        ("bf16", "the card computes bf16") if has_bf16 else ("fp16", "the card has no bf16, so fp16 with loss scaling")
    )


def choose_attention(recipe: Recipe, target: Target, precision: str, model: ModelPlan | None) -> tuple[str, str]:
    """Resolves the attention backend, by what the family of the model can be computed with.

    Raises:
        InputError: `varlen` or `sdpa` was asked for where it cannot run.
    """
    wish, dropout = recipe.attn_implementation, model.dropout if model else recipe.dropout or 0.0
    config = make_config(model.settings) if model else None
    own = find_backend(config) if config else "sdpa"
    if config is not None and own != "sdpa":
        if wish in ("sdpa", "varlen"):
            raise InputError(f"attn_implementation {wish} cannot be used: {explain_backend(config)}. Use eager or auto")
        return own, explain_backend(config)
    if wish != "varlen":
        return ("sdpa", "runs everywhere") if wish == "auto" else (wish, "asked for")
    problems = []
    if target.capability is None or target.capability < (8, 0):
        problems.append("it needs a GPU of compute capability 8.0 or newer")
    if precision == "fp32":
        problems.append("it needs precision bf16 or fp16")
    if dropout:
        problems.append(f"it knows no attention dropout (dropout is {dropout})")
    if problems:
        raise InputError(f"attn_implementation varlen cannot be used: {'; '.join(problems)}. Use sdpa")
    return "varlen", "asked for"


def find_compiler_problem(target: Target) -> str | None:
    """Says why `torch.compile` cannot work there; None where nothing speaks against it."""
    if target.capability is not None and target.capability < _LEAST_OF_TRITON:
        number = ".".join(map(str, target.capability))
        return f"Triton needs compute capability 7.0 or newer, and {target.name} has {number}"
    if not target.is_here:
        return "PyTorch for Windows comes without Triton" if target.host == "windows" else None
    if target.kind == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed or does not support this card"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return "no C++ compiler is installed"
    return None


def _find_build_problem(card: Card) -> str | None:
    """Says which build of PyTorch a card needs, if the installed one (without CUDA: the usual one) is of no use."""
    build = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else _USUAL_BUILD
    if build in card.torch_builds or not any(build in other.torch_builds for other in all_cards()):
        return None
    if not card.torch_builds:
        return f"no build of PyTorch from {_INDEX} has code for {card.name}: training on it needs one of your own"
    return f"PyTorch's {build} build has no code for {card.name}: install {_install(card.torch_builds[-1])}"


def _missing_code(index: int) -> str | None:
    """Says what to install where the installed PyTorch has no machine code for a card that is here."""
    found = [match.groups() for code in torch.cuda.get_arch_list() if (match := _CODE.fullmatch(code))]
    codes = [(kind, (int(major), int(minor))) for kind, major, minor in found]
    if not codes:
        return None
    capability = torch.cuda.get_device_capability(index)
    # Machine code runs on later cards of its generation, PTX on all later ones.
    if any(code <= capability and (kind == "compute" or code[0] == capability[0]) for kind, code in codes):
        return None
    build = _install(_OLDER_BUILD if capability < min(code for _, code in codes) else _USUAL_BUILD)
    number = ".".join(map(str, capability))
    return f"this PyTorch ({torch.__version__}) has no code for its compute capability {number}: install {build}"


def _install(build: str) -> str:
    return f"the {build} build, --index-url {_INDEX}/{build}"


def _torch_problem() -> str:
    if torch.version.cuda is None:
        index = f"{_USUAL_BUILD} ({_OLDER_BUILD} for cards older than Turing)"
        where = (
            "PyPI's PyTorch for Windows has no CUDA"
            if sys.platform == "win32"
            else "this PyTorch was built without CUDA"
        )
        return f"{where}: install it from the {index} index, see {_WHEELS}"
    return "PyTorch cannot use it: the driver may be too old for this PyTorch"
