"""Every error a user can meet.

    OnecardError
    ├── InputError            what you gave cannot work          exit 2
    │   ├── RecipeError       a recipe, with all its problems
    │   ├── DataError         a source, a file, a row
    │   ├── CheckpointError   damaged, missing or of another format
    │   └── RunBusyError      another process holds the run folder
    ├── DoesNotFitError       no setting fits the card           exit 3
    ├── DivergedError         training cannot go on              exit 4
    ├── DeviceLostError       the GPU is gone for this process   exit 5
    └── RankLostError         another process of the run is gone exit 6

A message says what was given, why it cannot work and what to change. Exit 130 (interrupted, resumable) is no error.
"""

from collections.abc import Sequence
from typing import Any

EXIT_INTERRUPTED = 130


class OnecardError(Exception):
    """Root of all errors onecard raises for people; `exit_code` is the process status of the commands."""

    exit_code = 1


class InputError(OnecardError):
    """Something the user gave cannot work; nothing has been written."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe with one or more problems, reported together.

    `problems` holds one sentence each; `origin` names the file or recipe they were found in.
    """

    def __init__(self, origin: str, problems: Sequence[str]) -> None:
        self.origin = origin
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{origin}: {count}", *(f"  - {problem}" for problem in self.problems)]))


class DataError(InputError):
    """A source, a file or a row that cannot be read as training text."""


class CheckpointError(InputError):
    """A checkpoint or run folder that is damaged, missing or written in a format this version cannot read."""


class RunBusyError(InputError):
    """Another process is working in the run folder."""


class DoesNotFitError(OnecardError):
    """No setting within the recipe's limits fits the memory of the card.

    `plan` is the plan that does not fit, with its forecast and the alternatives that would, where one was made.
    """

    exit_code = 3

    def __init__(self, message: str, plan: Any = None) -> None:
        super().__init__(message)
        self.plan = plan


class DivergedError(OnecardError):
    """The loss or the gradients stay non-finite, so that further steps would change nothing."""

    exit_code = 4


class DeviceLostError(OnecardError):
    """This process can use its GPU no more; a new one can go on from the last checkpoint."""

    exit_code = 5


class RankLostError(OnecardError):
    """Another process of the run does not answer any more; new ones can go on from the last checkpoint."""

    exit_code = 6
