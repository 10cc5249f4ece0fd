"""`--num_processes` and what joins the cards, taken out of the words of `plan`: a recipe's keys are flags, too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onecard.errors import InputError

if TYPE_CHECKING:
    from onecard.spec import CardGroup

_MOST = 1024


@dataclass(frozen=True)
class _Option:
    is_valid: Callable[[float], bool]
    wants: str


_COUNT = _Option(lambda value: 1 <= value <= _MOST and value == int(value), f"a whole number from 1 to {_MOST}")
_RATE = _Option(lambda value: 0 < value <= 10**5, "GB/s each way, more than 0")
_OPTIONS = {
    "num_processes": _COUNT,
    "cards_per_machine": _COUNT,
    "link_gb_per_s": _RATE,
    "network_gb_per_s": _RATE,
}


def take_group(words: Sequence[str]) -> "tuple[list[str], CardGroup | None]":
    """Takes a group of cards out of a command line; gives the rest, and None where it is for one process.

    Raises:
        InputError: with all that is wrong with it.
    """
    rest, found, problems = list[str](), dict[str, float](), list[str]()
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, text = word.partition("=")
        key = name.removeprefix("--").replace("-", "_").lower()
        if not name.startswith("--") or key not in _OPTIONS:
            rest.append(word)
            continue
        text = text if equals else waiting.pop(0) if waiting and not waiting[0].startswith("--") else ""
        option, value = _OPTIONS[key], _number(text)
        if value is None or not option.is_valid(value):
            problems.append(f"--{key} {text or 'without a value'}: give {option.wants}")
        elif found.setdefault(key, value) != value:
            problems.append(f"--{key} is given twice, as {found[key]:g} and as {value:g}: keep one of them")
    others = [f"--{key}" for key in found if key != "num_processes"]
    num = int(found.get("num_processes", 1))
    if num == 1 and others and not problems:
        problems.append(f"{', '.join(others)}: for several cards alone, so add --num_processes N with 2 or more")
    if problems:
        raise InputError("\n".join(problems))
    if num == 1:
        return rest, None
    from onecard.spec import CardGroup

    per_machine = found.get("cards_per_machine")
    return rest, CardGroup(
        num=num,
        per_machine=None if per_machine is None else int(per_machine),
        link_bytes_per_s=_bytes(found.get("link_gb_per_s")),
        network_bytes_per_s=_bytes(found.get("network_gb_per_s")),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bytes(gigabytes: float | None) -> float | None:
    return None if gigabytes is None else 1e9 * gigabytes
