"""`--num_processes`: several processes of one command on this machine, started by torchrun's own agent.

    onecard train RECIPE --num_processes 2  ──►  torchrun --standalone --nproc_per_node=2 -m onecard train RECIPE

Nothing is added to what torchrun does but one exit code and one message for all.
"""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from onecard.distributed.place import LAUNCHED_VARIABLE
from onecard.errors import EXIT_INTERRUPTED, InputError, RankLostError

_FLAG = "--num-processes"
_VERBS = ("train", "resume")
# On few cores some are tried, which is slow; hundreds would take all memory before anything could be said.
_MOST = max(8, os.cpu_count() or 1)
# How a process ends that has said why; 1 is Python's, too, after a traceback.
_TOLD = frozenset({1, 2, 3, 4, 5, 6, EXIT_INTERRUPTED})
# As this process was started: an installed command does not look for modules in the current folder.
_FLAGS = ["-P"] if sys.flags.safe_path else []
# A run that is asked to stop writes its state first; torchrun's own half minute is little for a large one.
_SHUTDOWN_S = 300


def take_num_processes(words: Sequence[str]) -> tuple[list[str], int]:
    """Takes `--num_processes N` out of a command line of `train` or `resume`; gives the rest, and 1 without it.

    Raises:
        InputError: its value is no number of processes.
    """
    rest, found = list[str](), list[str]()
    waiting = list(words)
    if not words or words[0] not in _VERBS:
        return waiting, 1
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != _FLAG:
            rest.append(word)
            continue
        found.append(value if equals else waiting.pop(0) if waiting else "")
    if not found:
        return rest, 1
    if len(set(found)) > 1 or not found[0].isdecimal() or not 1 <= int(found[0]) <= _MOST:
        given = " and ".join(found) or "nothing"
        raise InputError(
            f"--num_processes {given}: give one number from 1 to {_MOST}, for this machine has {os.cpu_count()} cores; "
            "for several machines use `torchrun`"
        )
    return rest, int(found[0])


def check_is_for_several(words: Sequence[str]) -> None:
    """Refuses a command that several processes cannot do together.

    Raises:
        InputError: each of them would do the same, into the same files.
    """
    verb = words[0] if words else "onecard"
    if verb not in _VERBS or any(word.split("=")[0] == "--verify" for word in words):
        what = "resume --verify" if verb in _VERBS else verb
        raise InputError(f"{what} runs in one process: start it without `torchrun` and without --num_processes")


def launch(words: Sequence[str], num_processes: int) -> int:
    """Runs a command in so many processes and gives the exit code of the first that failed, or 0.

    A process that was killed counts as one that is lost, so that a supervisor starts all of them again.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[LAUNCHED_VARIABLE] = "1"
    # Its own reports of a failure are for people who look for it in its code, and nothing else runs in this process.
    logging.disable()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=_SHUTDOWN_S,
    )
    try:
        elastic_launch(config, entrypoint=sys.executable)(*_FLAGS, "-m", "onecard", *words)
    except SignalException:
        return EXIT_INTERRUPTED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in _TOLD:
            return failure.exitcode
        name = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        cause = ", as a system does that runs out of memory" if failure.exitcode == -9 else ""
        print(
            f"rank {rank} of {num_processes} was killed ({name}{cause}). The others were stopped; the last checkpoint "
            "is whole",
            file=sys.stderr,
        )
        return RankLostError.exit_code
    return 0


def main() -> None:
    """`python -m onecard.distributed.launch N train ...`, for a supervisor to start."""
    sys.exit(launch(sys.argv[2:], int(sys.argv[1])))


if __name__ == "__main__":
    main()
