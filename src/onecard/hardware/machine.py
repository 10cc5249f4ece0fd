"""What a machine has, as far as a plan needs to know."""

from dataclasses import dataclass
from typing import Literal

Platform = Literal["linux", "windows", "wsl", "macos"]


@dataclass(frozen=True)
class Gpu:
    """A card as its driver describes it.

    `index` is the one `nvidia-smi` shows. CUDA may count in another order (fastest first), so programs that need
    torch's index must match `uuid`.
    """

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    driver: str
    uuid: str

    @property
    def supports_bf16(self) -> bool:
        """Ampere (8.0) is the first generation that computes in bf16; older ones only emulate it."""
        return self.compute_capability >= (8, 0)


@dataclass(frozen=True)
class Machine:
    """Cards, cores and memory that this process may use.

    `gpus` are those that CUDA_VISIBLE_DEVICES leaves visible, in its order. `gpu_problem` says why cards that seem
    to be there cannot be read. `bf16_cpu_reason` says what `has_bf16_cpu` was decided by.
    """

    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    driver: str | None
    num_cores: int
    ram_bytes: int
    free_ram_bytes: int
    platform: Platform
    python: str
    has_bf16_cpu: bool
    bf16_cpu_reason: str
