"""`onecard monitor`."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from onecard.cli.monitor_text import describe_problem, frame_lines, plain_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from onecard.report.live import Follower, LiveView

_REDRAW_S = 1.0
# Without a terminal lines stay: one a step of a fast run would be a flood.
_LINE_S = 10.0


def monitor(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or latest.")],
    once: Annotated[bool, typer.Option("--once", help="Show how it stands now, and end.")] = False,
) -> None:
    """Shows a run that trains in another terminal: loss, speed, time left, the card, findings. Ends with the run."""
    from rich.console import Console

    from onecard import api

    follower = api.monitor(run)
    console = Console(highlight=False)
    try:
        if once:
            console.print(_frame(follower.look(), console), soft_wrap=not console.is_interactive)
        elif console.is_interactive:
            _watch(follower, console)
        else:
            _log(follower)
    except KeyboardInterrupt:  # of the view; the run is another process
        raise typer.Exit from None


def _watch(follower: "Follower", console: "Console") -> None:
    from rich.live import Live

    view = follower.look()
    with Live(_frame(view, console), console=console, auto_refresh=False) as live:
        while view.finished is None:
            time.sleep(_REDRAW_S)
            view = follower.look()
            live.update(_frame(view, console), refresh=True)


def _log(follower: "Follower") -> None:
    told, problem = None, None
    while True:
        view = follower.look()
        if view.problem not in (None, problem):
            print(describe_problem(view.problem), flush=True)
        problem = view.problem
        if view.step is not None and (view.step.step, view.finished) != told:
            told = view.step.step, view.finished
            print(plain_line(view), flush=True)
        if view.finished is not None:
            return
        time.sleep(_LINE_S)


def _frame(view: "LiveView", console: "Console") -> "Text":
    from rich.text import Text

    return Text("\n").join(
        Text.assemble((f"{label:10}", "bold"), (text, style))
        for label, text, style in frame_lines(view, console.width, console.encoding)
    )
