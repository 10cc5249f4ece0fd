"""One thread that writes for all clients, in the order in which they asked."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from onecard.handover.replies import RequestRefusedError
from onecard.handover.writer import Prompt, Writer, Written
from onecard.model.generate import Sampling

log = logging.getLogger("onecard.serve")

_STOPPING = "it is being stopped"
# Texts that wait for their turn: who comes later is told to try again instead of waiting for hours.
MOST_WAITING = 64

Item = str | Written | Exception


@dataclass
class Job:
    """A text to be written; `items` gets its pieces and, last, what came of it. `cancel` ends it early."""

    prompt: Prompt
    sampling: Sampling
    stops: Sequence[str] = ()
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    items: "asyncio.Queue[Item]" = field(default_factory=asyncio.Queue)
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.is_cancelled.set()

    def tell(self, item: Item) -> None:
        """Passes an item from the worker's thread to the event loop; one that has closed needs it no more."""
        try:
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:
            self.cancel()

    async def results(self) -> AsyncIterator[str | Written]:
        """Gives the pieces as they come, last the whole; raises what went wrong."""
        while True:
            item = await self.items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Written):
                return


class Worker:
    """Takes jobs in order; a job that fails, or whose client has left, ends alone."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._waiting: deque[Job] = deque()
        # Reentrant: a signal may stop the server in the midst of `submit`.
        self._changed = threading.Condition(threading.RLock())
        self._current: Job | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="onecard-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Puts a job behind those that wait.

        Raises:
            RequestRefusedError: too many do.
        """
        with self._changed:
            if self._is_stopping:
                job.tell(RuntimeError(_STOPPING))
                return
            # Those that have left wait for nothing.
            self._waiting = deque(other for other in self._waiting if not other.is_cancelled.is_set())
            if len(self._waiting) >= MOST_WAITING:
                raise RequestRefusedError(
                    503, f"{MOST_WAITING} requests wait already: ask again in a while", code="server_busy"
                )
            self._waiting.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Ends the job at hand after its next token and refuses those that wait; returns at once."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if (current := self._current) is not None:
            current.cancel()

    def close(self) -> None:
        """Stops, and waits for the thread."""
        self.stop()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if not job.is_cancelled.is_set():
                job.tell(self._write(job))
            self._current = None

    def _next(self) -> Job | None:
        """Waits for a job; None where the server stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_stopping)
            if self._is_stopping:
                for job in self._waiting:
                    job.tell(RuntimeError(_STOPPING))
                self._waiting.clear()
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _write(self, job: Job) -> Item:
        try:
            return self._writer.write(
                job.prompt, job.sampling, job.tell, stops=job.stops, is_cancelled=job.is_cancelled.is_set
            )
        except Exception as error:  # out of memory, a defect: the next client shall be served all the same
            log.exception("a request has failed")
            return error
