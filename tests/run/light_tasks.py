"""Tasks that need nothing that is not installed: in one a model writes, in one it says what it finds likely."""

from collections.abc import Callable
from typing import Any

import numpy as np

from onecard.evaluation.paired import Items
from onecard.evaluation.responses import respond
from onecard.evaluation.task import Result, Subject
from onecard.evaluation.work import Likelihoods
from onecard.run.tasks import TaskSettings
from onecard.spec import Score

WORDS = ("the", "lazy", "dog", "jumps", "over", "a", "quick", "brown", "fox", "and", "sleeps")
PROMPTS = [f"{word} " for word in WORDS] * 4


class LettersTask:
    """Scores responses by how many of their characters are letters."""

    name = "ifeval"
    ranks_by = "letters"
    is_lower_better = False

    def __init__(self, settings: TaskSettings, report: Any, before: Callable[[], None] = lambda: None) -> None:
        self._prompts = PROMPTS[: settings.limit]
        self._settings = settings
        self._report = report
        self._before = before
        self.num_items = len(self._prompts)
        self.fingerprint = f"letters of {self.num_items}"

    def measure(self, subject: Subject) -> Result:
        self._before()
        settings = self._settings
        found = respond(subject, self._prompts, settings.max_new_tokens, 5, self._report)
        sums = np.array([sum(map(str.isalpha, text)) for text in found.texts], float)
        items = Items(sums, np.ones(len(sums), int))
        value, error = items.ratio()
        rows = tuple({"prompt": p, "response": t} for p, t in zip(self._prompts, found.texts, strict=True))
        score = Score(name="letters", value=value, standard_error=error, n=len(sums), protocol=subject.protocol)
        return Result((score,), items, rows=rows)


class LikelyTask:
    """Scores how likely a model finds each word after the one before it."""

    name = "likely"
    ranks_by = "surprise"
    is_lower_better = True

    def __init__(self, settings: TaskSettings, report: Any) -> None:
        self._pairs = list(zip(WORDS, [f" {word}" for word in WORDS[1:]], strict=False))[: settings.limit]
        self._report = report
        self.num_items = len(self._pairs)
        self.fingerprint = f"{self.num_items} words"

    def measure(self, subject: Subject) -> Result:
        pairs = [tuple(subject.tokenizer.encode(text) for text in pair) for pair in self._pairs]
        found = subject.perform(Likelihoods(pairs, 16, 3), self._report)
        items = Items(np.array([-value for value, _ in found]), np.array([len(ids) for _, ids in pairs]))
        value, error = items.ratio()
        rows = tuple({"pair": pair, "is_likeliest": verdict} for pair, (_, verdict) in zip(pairs, found, strict=True))
        score = Score(name="surprise", value=value, standard_error=error, n=len(pairs), protocol=subject.protocol)
        return Result((score,), items, rows=rows)


def make_light_task(name: str, settings: TaskSettings, report: Any = None) -> LettersTask | LikelyTask:
    """Stands for `make_task`."""
    return LikelyTask(settings, report) if name == LikelyTask.name else LettersTask(settings, report)
