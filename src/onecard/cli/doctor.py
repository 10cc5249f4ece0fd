"""`onecard doctor`."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from onecard.cli.recipe_words import JsonOption
from onecard.cli.status import StatusLine

if TYPE_CHECKING:
    from onecard.diagnose.check import Check

_COLOURS = {"good": "green", "warning": "yellow", "bad": "bold red", "not applicable": "dim"}
_WORDS = {"not applicable": "-"}
_WIDTH = len("warning")


def doctor(as_json: JsonOption = False) -> None:
    """Tests this machine: driver, PyTorch, arithmetic, memory, disks, network; exit code 1 where something is bad."""
    from onecard import api

    checks = list(_shown(api.examine(sys.stdout.encoding), is_quiet=as_json))
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks]}, ensure_ascii=False))
    else:
        counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("good", "warning", "bad")}
        print(f"\n{counts['good']} good, {counts['warning']} to look at, {counts['bad']} bad")
    if any(check.verdict == "bad" for check in checks):
        raise typer.Exit(1)


def _shown(checks: "Iterable[Check]", *, is_quiet: bool) -> "Iterable[Check]":
    """Prints each outcome when it is there; a line tells meanwhile that there is more to come."""
    status = StatusLine()
    try:
        status.tell("testing")
        for check in checks:
            if not is_quiet:
                status.close()
                _print(check)
            yield check
            status.tell("testing")
    finally:
        status.close()


def _print(check: "Check") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    word = _WORDS.get(check.verdict, check.verdict)
    line = Text.assemble((f"{word:{_WIDTH}}", _COLOURS[check.verdict]), f"  {check.name}: {check.found}")
    console.print(line, soft_wrap=not console.is_interactive)
    if check.remedy:
        console.print(Text(f"{'':{_WIDTH}}  -> {check.remedy}"), soft_wrap=not console.is_interactive)
