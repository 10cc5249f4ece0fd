"""Which of the processes of a run this one is, as `torchrun` says it. Imports nothing heavy: the command line asks."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from onecard.errors import InputError

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """A process by its number among all and among those of its machine; rank 0 leads: it alone writes and prints."""

    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.num_ranks}"


ALONE = Place(0, 1, 0, 1)
# Set by `launch`: it sees how a process ends, which the others do not.
LAUNCHED_VARIABLE = "ONECARD_LAUNCHED"


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Reads the place of this process from its environment; `ALONE` where nobody started it as one of several.

    Raises:
        InputError: some of the variables are missing, or say what cannot be.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if not given:
        return ALONE
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        raise InputError(
            f"{_list(given)} set, but {_list(missing)} not: start several processes with `torchrun` or "
            f"--num_processes, or unset {' and '.join(given)} for one"
        )
    try:
        rank, num_ranks, local_rank = (int(environment[name]) for name in _NEEDED[:3])
        num_local_ranks = int(environment.get("LOCAL_WORLD_SIZE", num_ranks))
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers: {error}") from error
    if not (0 <= rank < num_ranks and 0 <= local_rank < num_local_ranks <= num_ranks):
        raise InputError(
            f"rank {rank} of {num_ranks}, on its machine {local_rank} of {num_local_ranks}, cannot be: ranks count "
            "from 0 and are less than their number. `torchrun` sets them"
        )
    return Place(rank, num_ranks, local_rank, num_local_ranks)


def _list(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def is_one_of_several() -> bool:
    """Whether this process was started as one of several, whatever else its environment says."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_follower() -> bool:
    """Whether another process of this run writes and prints."""
    return not find_place().is_leader


def is_launched() -> bool:
    """Whether `--num_processes` started this process, whose launcher names a rank that was killed."""
    return LAUNCHED_VARIABLE in os.environ


def is_to_be_said(message: str) -> bool:
    """Whether this process is the one to print an error: of those of a machine the first, and whoever it is about."""
    try:
        place = find_place()
    except InputError:
        return bool(message)
    return bool(message) and (place.local_rank == 0 or str(place) in message)
