"""Progress for people: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, TextIO
from unicodedata import category

from onecard.observe import prose
from onecard.observe.events import (
    ChosenEvent,
    EvaluatedEvent,
    Event,
    FindingEvent,
    FinishedEvent,
    RanksEvent,
    RecoveredEvent,
    SampledEvent,
    SavedEvent,
    ScoredEvent,
    StepEvent,
)
from onecard.observe.pace import Pace

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from onecard.spec import Plan

# A redraw takes 0.4 ms, several times that on an old Windows console: this keeps it under 1% of the time.
_REDRAW_INTERVAL_S = 0.2
_WIDTH_FOR_BAR = 60
_WIDTH_FOR_PEAK = 72


class ConsoleSink:
    """Shows a run on `stream` (stdout by default); `logging_steps` is the distance of lines when it is no terminal."""

    def __init__(self, plan: "Plan", *, logging_steps: int = 10, stream: TextIO | None = None) -> None:
        # rich takes longer to import than all else here, and those who only read events do not need it.
        from rich.console import Console

        self._console = Console(file=stream or sys.stdout, highlight=False)
        self._num_steps = plan.schedule.num_steps
        self._is_chat = plan.task == "sft"
        self._logging_steps = logging_steps
        self._pace = Pace(self._num_steps, max_hours=plan.max_hours, window=logging_steps)
        self._has_stepped = False
        self._redrawn_at = 0.0
        self._findings: list[FindingEvent] = []
        self._looks: list[RanksEvent] = []
        self._bar: tuple[Progress, TaskID] | None = self._start_bar() if self._console.is_interactive else None

    def receive(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._receive_step(event)
            case EvaluatedEvent():
                self._print(f"step {event.step}  {prose.describe_evaluated(event)}", "green" if event.is_best else "")
            case SampledEvent():
                self._print_samples(event)
            case ScoredEvent():
                self._print(f"step {event.step}  {prose.describe_scored(event)}", "green" if event.is_best else "")
            case ChosenEvent():
                self._print(f"step {event.step}  {prose.describe_chosen(event)}", "bold green")
            case SavedEvent():
                self._print(f"step {event.step}  {prose.describe_saved(event)}", "dim")
            case FindingEvent():
                self._findings.append(event)
                symptom, *details = prose.describe_finding(event)
                self._print(f"step {event.step}  {symptom}", "bold red" if event.stops_run else "bold yellow")
                self._print("\n".join(details))
            case RecoveredEvent():
                self._receive_recovered(event)
            case RanksEvent():
                self._looks.append(event)
            case FinishedEvent():
                self.close()
                self._print("\n".join(prose.describe_finished(event)), "bold")
                if told := prose.describe_ranks(self._looks):
                    self._print(told)
                self._print_findings()

    def close(self) -> None:
        """Leaves the bar as it stands, also after an error; lines can follow."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _start_bar(self) -> "tuple[Progress, TaskID]":
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

        columns: list[ProgressColumn] = [TextColumn("{task.completed}/{task.total}", style="bold")]
        if self._console.width >= _WIDTH_FOR_BAR:
            columns.append(BarColumn(bar_width=None))
        columns.append(TextColumn("{task.description}", markup=False))
        # Redrawn from `receive`, not by rich's thread, which would take the interpreter from the training loop.
        progress = Progress(*columns, console=self._console, auto_refresh=False, expand=True)
        task = progress.add_task("starting", total=self._num_steps)
        progress.start()
        progress.refresh()
        return progress, task

    def _receive_step(self, event: StepEvent) -> None:
        self._pace.add(event)
        is_first, self._has_stepped = not self._has_stepped, True
        if self._bar is None:
            if is_first or event.step % self._logging_steps == 0:
                self._print(self._step_line(event))
            return
        now = time.monotonic()
        if is_first or event.step == self._num_steps or now - self._redrawn_at >= _REDRAW_INTERVAL_S:
            self._redrawn_at = now
            progress, task = self._bar
            progress.update(task, completed=event.step, description=self._bar_text())
            progress.refresh()

    def _receive_recovered(self, event: RecoveredEvent) -> None:
        if event.returned_from is not None:
            self._pace.go_back()
        what, *details = prose.describe_recovered(event)
        self._print(f"step {event.step}  {what}", "bold yellow")
        self._print("\n".join(details))

    def _step_line(self, event: StepEvent) -> str:
        parts = (
            f"step {event.step}/{self._num_steps}",
            f"loss {self._pace.loss:.4f}",
            f"lr {event.learning_rate:.1e}",
            prose.describe_speed(self._pace),
            prose.describe_time_left(self._pace),
            prose.describe_refused(self._pace),
        )
        return "  ".join(part for part in parts if part)

    def _bar_text(self) -> str:
        width = self._console.width
        parts = [f"loss {self._pace.loss:.4f}"]
        if width >= _WIDTH_FOR_BAR:
            parts.append(prose.describe_speed(self._pace, with_share=width >= _WIDTH_FOR_PEAK))
        parts += [prose.describe_time_left(self._pace), prose.describe_refused(self._pace)]
        return "  ".join(part for part in parts if part)

    def _print_samples(self, event: SampledEvent) -> None:
        self._print(f"step {event.step}  samples", "bold")
        for sample in event.samples:
            prompt, completion = (text.replace("\n", "\n  ") for text in (sample.prompt, sample.completion))
            # An answer is a turn of its own.
            self._print(f"  {prompt}", "dim", tail=f"\n  > {completion}" if self._is_chat else completion)

    def _print_findings(self) -> None:
        """Says again at the end what scrolled by hours ago."""
        if self._findings:
            self._print("\n".join(prose.list_findings(self._findings)), "yellow")

    def _print(self, text: str, style: str = "", *, tail: str = "") -> None:
        """Prints `text` in `style` and `tail` in none; both may be what a model wrote, so nothing is interpreted."""
        from rich.text import Text

        encoding = self._console.encoding
        line = Text.assemble((printable(text, encoding), style), printable(tail, encoding))
        # A terminal wraps at words; a log keeps each line whole.
        self._console.print(line, soft_wrap=not self._console.is_interactive)


def printable(text: str, encoding: str) -> str:
    """Replaces what a terminal would obey (escape sequences) and what its code page cannot show by `?`."""
    visible = "".join("?" if category(c) == "Cc" and c not in "\n\t" else c for c in text)
    return visible.encode(encoding, errors="replace").decode(encoding)
