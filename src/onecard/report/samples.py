"""What a model wrote to each prompt as it learned."""

from dataclasses import dataclass
from unicodedata import category

from onecard.observe.events import SampledEvent
from onecard.report.record import RunRecord

# A run of a hundred samplings would be a book: of each prompt so many moments are told, of so many prompts.
_MAX_MOMENTS, _MAX_PROMPTS, _MAX_CHARACTERS = 6, 8, 2000


@dataclass(frozen=True)
class PromptHistory:
    """A prompt and pairs of step and completion, evenly chosen among `num_moments`, the first and the last included."""

    prompt: str
    moments: tuple[tuple[int, str], ...]
    num_moments: int


def tell_samples(run: RunRecord) -> tuple[tuple[PromptHistory, ...], int]:
    """Orders samples by prompt; returns those that are told and how many prompts there are."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for event in run.of(SampledEvent):
        for sample in event.samples:
            by_prompt.setdefault(sample.prompt, []).append((event.step, sample.completion))
    histories = [
        PromptHistory(
            _shown(prompt), tuple((step, _shown(text)) for step, text in _spread(moments, _MAX_MOMENTS)), len(moments)
        )
        for prompt, moments in by_prompt.items()
    ]
    return tuple(histories[:_MAX_PROMPTS]), len(histories)


def _spread(moments: list[tuple[int, str]], count: int) -> list[tuple[int, str]]:
    if len(moments) <= count:
        return moments
    return [moments[round(index * (len(moments) - 1) / (count - 1))] for index in range(count)]


def _shown(text: str) -> str:
    """Cuts a long text, and replaces what no page may hold: control characters and halves of surrogate pairs."""
    text = text.strip("\n")
    cut = text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} …"
    return "".join("\ufffd" if category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in cut)
