"""The batches of a run."""

from types import TracebackType

from onecard.data import Batch, BatchStream, StreamSettings, TrainingData
from onecard.spec import Plan
from onecard.training.spread import own_share
from onecard.training.state import TrainState


class Feed:
    """Gives the micro-batches of each step, as the plan of a state cuts them, from where the state stands.

    Of several ranks each gets every so many-th micro-batch; `num_tokens` are those of the latest step on all of them.
    `reopen` is for a state whose plan or place has changed. Close it, or use it in a `with` block.
    """

    def __init__(self, state: TrainState, corpus: TrainingData) -> None:
        self._state = state
        self._corpus = corpus
        self._stream = self._open()
        self.num_tokens = 0

    def __next__(self) -> list[Batch]:
        batches = next(self._stream)
        self.num_tokens = sum(batch.num_tokens for batch in batches)
        # All ranks lay out the whole step, which is cheap: how samples share rows depends on all of them.
        return own_share(self._state, batches)

    @property
    def wait_s(self) -> float:
        """How long the latest step kept its caller waiting."""
        return self._stream.wait_s

    def reopen(self) -> None:
        """Drops what was prepared ahead, and begins again where the state stands."""
        self._stream.close()
        self._stream = self._open()

    def _open(self) -> BatchStream:
        plan, position = self._state.plan, self._state.progress.position
        return self._corpus.open_stream(stream_settings(plan), plan.seed, plan.max_seq_length, position)

    def close(self) -> None:
        """Stops the workers."""
        self._stream.close()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def stream_settings(plan: Plan) -> StreamSettings:
    """How the steps of a plan are cut and prepared."""
    return StreamSettings(
        samples_per_step=plan.total_batch_size,
        micro_batch_size=plan.micro_batch_size,
        num_workers=plan.dataloader_num_workers,
        prefetch_factor=plan.dataloader_prefetch_factor,
        pin_memory=plan.device.startswith("cuda"),
        packing=plan.packing,
        static_shapes=plan.has_static_shapes,
    )
