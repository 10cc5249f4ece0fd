"""One thread that writes for all clients, in the order in which they asked."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from onecard.handover.writer import Prompt, Writer, Written
from onecard.model.generate import Sampling

log = logging.getLogger("onecard.serve")

_STOPPING = "it is being stopped"

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
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._current: Job | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="onecard-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)
        if self._is_stopping:  # the thread may have ended before it came
            job.tell(RuntimeError(_STOPPING))

    def stop(self) -> None:
        """Ends the job at hand after its next token and refuses those that wait; returns at once."""
        self._is_stopping = True
        self._jobs.put(None)
        if (current := self._current) is not None:
            current.cancel()

    def close(self) -> None:
        """Stops, and waits for the thread."""
        self.stop()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._current = job
            if self._is_stopping:
                job.tell(RuntimeError(_STOPPING))
            elif not job.is_cancelled.is_set():
                job.tell(self._write(job))
            self._current = None

    def _write(self, job: Job) -> Item:
        try:
            return self._writer.write(
                job.prompt, job.sampling, job.tell, stops=job.stops, is_cancelled=job.is_cancelled.is_set
            )
        except Exception as error:  # out of memory, a defect: the next client shall be served all the same
            log.exception("a request has failed")
            return error
