"""Shows a run while it trains and says at its end what to do next: shared by `train` and `resume`."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

import typer

from onecard.cli.audit_text import audit_rows, print_samples
from onecard.cli.commands import command, quote
from onecard.cli.forecast_text import bar_lines, forecast_rows
from onecard.cli.outcome_text import outcome_rows
from onecard.cli.plan_text import summary_rows
from onecard.cli.preparation import PreparationProgress
from onecard.cli.rows import print_rows, width_of
from onecard.distributed.place import is_follower
from onecard.errors import EXIT_INTERRUPTED, DivergedError
from onecard.run.disk_loss import LOST_DISK, is_disk_lost
from onecard.run.lifeline import Lifeline

if TYPE_CHECKING:
    from onecard.observe import ConsoleSink, Event, FinishedEvent
    from onecard.spec import Plan

_DISK_REFUSES = LOST_DISK | {errno.ENOSPC, errno.EROFS, errno.EFBIG}


class Trains(Protocol):
    """`api.train` and `api.resume` with all but their callbacks given."""

    def __call__(
        self,
        *,
        on_event: "Callable[[Event], None]",
        on_plan: "Callable[[Plan, Path], None]",
        on_progress: Callable[[str, int, int | None], None],
    ) -> Path: ...


class OutlivingStream:
    """A stream that goes on, to nowhere, where its reader is gone: `| head`, or `| tee log` that Ctrl+C ended."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._turn_away()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._turn_away()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _turn_away(self) -> None:
        # Of the descriptor itself: what is left in buffers would otherwise be an error once more at the end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with contextlib.suppress(OSError):
            print("nobody reads what is printed any more: the run goes on", file=sys.stderr)


class RunView:
    """Hears what a run does and shows it on `stream`: preparation, the plan, progress."""

    def __init__(self, stream: TextIO, lifeline: Lifeline | None = None) -> None:
        self._stream = stream
        self.lifeline = lifeline or Lifeline(None)
        self._has_begun = False
        self._max_restarts = 0
        self._preparation = PreparationProgress(stream)
        self._sink: ConsoleSink | None = None
        self.run_folder: Path | None = None
        self.plan: Plan | None = None
        self.finished: FinishedEvent | None = None
        self.evaluations_s: list[float] = []

    def on_progress(self, stage: str, done_bytes: int, total_bytes: int | None) -> None:
        self._preparation(stage, done_bytes, total_bytes)

    def on_plan(self, plan: "Plan", run_folder: Path) -> None:
        from onecard.observe import ConsoleSink
        from onecard.run.folder import RunFolder

        self._preparation.close()
        self.plan, self.run_folder = plan, run_folder
        folder = RunFolder(run_folder)
        recipe = folder.recipe()
        self._max_restarts = recipe.max_restarts
        self.lifeline.tell(run_folder, self._max_restarts, has_begun=not folder.has_record())
        # A run that goes on has told what counts.
        audit = None if folder.has_record() else folder.audit()
        *rows, place = summary_rows(plan, run_folder)
        if audit is not None:
            rows += audit_rows(audit)
        rows += [*forecast_rows(plan), place]
        if plan.reasons:
            rows.append(("choices", f"with their reasons: {command('onecard')} plan --explain {quote(run_folder)}"))
        print_rows(rows, self._stream)
        if audit is not None:
            print_samples(audit, self._stream)
        if bars := bar_lines(plan, width_of(self._stream)):
            print("\n".join(["", *bars]), file=self._stream)
        if bars or audit is not None:
            print(file=self._stream)
        given = recipe.logging_steps
        logging_steps = plan.steps_per_epoch if given == "epoch" else given
        self._sink = ConsoleSink(plan, logging_steps=logging_steps, stream=self._stream)

    def on_event(self, event: "Event") -> None:
        from onecard.observe import EvaluatedEvent, FinishedEvent

        if self.run_folder is not None:
            self._has_begun = True
            self.lifeline.tell(self.run_folder, self._max_restarts, has_begun=True)
        if isinstance(event, FinishedEvent):
            self.finished = event
        elif isinstance(event, EvaluatedEvent):
            self.evaluations_s.append(event.seconds)
        if self._sink is not None:
            try:
                self._sink.receive(event)
            except OSError as error:  # output sent to a file on a full disk: the run goes on, and events.jsonl tells
                if error.errno not in _DISK_REFUSES:
                    raise

    def is_run_gone(self) -> bool:
        """Whether the folder of a run that was in training is not there any more, as that of a share."""
        # Of Python 3.11 `Path.exists` raises what a share answers.
        return self._has_begun and self.run_folder is not None and not os.path.lexists(self.run_folder)

    def close(self) -> None:
        self._preparation.close()
        if self._sink is not None:
            self._sink.close()


def watch(train: Trains, *, as_json: bool) -> None:
    """Trains with the run shown live; afterwards prints where things are, or one JSON document.

    Exits with 130 where the run was interrupted. A run goes on where nobody reads what it prints.

    Raises:
        DivergedError: as the run did.
    """
    with contextlib.redirect_stdout(cast(TextIO, OutlivingStream(sys.stdout))):
        _watch(train, as_json=as_json)


def _watch(train: Trains, *, as_json: bool) -> None:
    from onecard.observe import to_json_line

    # With --json stdout belongs to the document alone.
    stream = sys.stderr if as_json else sys.stdout
    view = RunView(stream, Lifeline.take_up())
    divergence: DivergedError | None = None
    try:
        run_folder = train(on_event=view.on_event, on_plan=view.on_plan, on_progress=view.on_progress)
    except KeyboardInterrupt:
        view.close()
        _print_stopped(view.run_folder)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except DivergedError as error:
        if view.run_folder is None or view.finished is None:
            raise
        run_folder, divergence = view.run_folder, error
    except Exception as error:
        if is_disk_lost(error) or view.is_run_gone():
            view.lifeline.tell_lost_disk()
        raise
    finally:
        view.close()
    if is_follower():  # another process of the run tells what comes next
        return
    reason = view.finished.reason if view.finished else "completed"
    if as_json:
        outcome = json.loads(to_json_line(view.finished)) if view.finished else {}
        print(json.dumps({"run": str(run_folder), **outcome}))
    elif reason != "interrupted":
        _print_next_steps(view, run_folder)
    sys.stdout.flush()  # here, where a reader who is gone is no error
    if reason == "interrupted":
        _print_stopped(run_folder)
    if divergence is not None:
        raise divergence
    if reason == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)


def _print_stopped(run_folder: Path | None) -> None:
    rest = "" if run_folder is None else f"; resume with: {command('onecard')} resume {quote(run_folder)}"
    print(f"stopped{rest}", file=sys.stderr)


def _print_next_steps(view: RunView, run_folder: Path) -> None:
    from onecard.run.folder import RunFolder

    if view.plan is not None and view.finished is not None:
        outcome = RunFolder(run_folder).outcome()
        if rows := outcome_rows(view.plan, view.finished, outcome, view.evaluations_s):
            print_rows(rows)
    onecard, folder = command("onecard"), quote(run_folder)
    # Only a run on chats has an audit of what counts in them.
    is_chat = RunFolder(run_folder).audit() is not None
    trial = f"{onecard} chat {folder}" if is_chat else f'{onecard} generate {folder} --prompt "..."'
    rows = [("run folder", str(run_folder)), ("try it", trial)]
    if (report := run_folder / "report.html").exists():
        rows.append(("report", str(report)))
    if (run_folder / "tensorboard").exists():
        rows.append(("see curves", f"{command('tensorboard')} --logdir {folder}"))
    for label, text in rows:
        # One line each, however long, so that it can be copied.
        print(f"{label:13}{text}")
