"""IFEval as a task: responses, verdicts, four accuracies."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from onecard.evaluation.ifeval import PROMPT_STRICT, STANDARD_PROMPTS, STANDARD_TOKENS, Checker, score_verdicts
from onecard.evaluation.responses import respond
from onecard.evaluation.task import Result, Subject
from onecard.evaluation.work import Report
from onecard.spec.score import Protocol


class IFEvalTask:
    """Scores the responses of a model to prompts, the first `limit` of them; `report` hears how many are written."""

    name = "ifeval"
    ranks_by = PROMPT_STRICT
    is_lower_better = False

    def __init__(
        self,
        prompts: Sequence[dict[str, Any]],
        checker: Checker,
        *,
        max_new_tokens: int,
        batch_size: int,
        limit: int | None = None,
        report: Report | None = None,
    ) -> None:
        self._checker = checker
        self._prompts = list(prompts[:limit])
        self._checker.try_out(self._prompts)
        self.num_items = len(self._prompts)
        self.fingerprint = str(ifeval_protocol(self._prompts, self._checker)["data"])
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._limit = limit
        self._report = report

    def measure(self, subject: Subject) -> Result:
        """Measures one model."""
        texts = [prompt["prompt"] for prompt in self._prompts]
        found = respond(subject, texts, self._max_new_tokens, self._batch_size, self._report)
        protocol = (
            subject.protocol
            | ifeval_protocol(self._prompts, self._checker)
            | {
                "template": found.template,
                "max_new_tokens": found.token_limit,
                "is_greedy": True,
                "num_fewshot": 0,
                "limit": self._limit,
                "num_unfinished": found.num_unfinished,
            }
        )
        notes = []
        if found.token_limit < self._max_new_tokens:
            notes.append(
                f"responses have {found.token_limit:,} tokens at most, not {self._max_new_tokens:,}: the model's "
                "positions leave no more beside the longest prompt"
            )
        if (found.token_limit, len(texts)) != (STANDARD_TOKENS, STANDARD_PROMPTS):
            notes.append(
                f"not the standard IFEval ({STANDARD_PROMPTS} prompts, {STANDARD_TOKENS:,} tokens): compare only with "
                "scores of the same protocol"
            )
        if found.num_unfinished:
            notes.append(f"{found.num_unfinished:,} of {len(texts):,} responses reached the limit without a stop token")
        verdicts = [self._checker.judge(prompt, text) for prompt, text in zip(self._prompts, found.texts, strict=True)]
        scores, items = score_verdicts(verdicts, protocol)
        rows = tuple(
            {"prompt": prompt, "response": text, "strict": verdict.strict, "loose": verdict.loose}
            for prompt, text, verdict in zip(texts, found.texts, verdicts, strict=True)
        )
        return Result(scores, items, tuple(notes), rows)


def ifeval_protocol(prompts: Sequence[dict[str, Any]], checker: Checker) -> Protocol:
    """Says which prompts are judged, by their hash, and by which versions."""
    # Without the arguments that are None, which the Hub's copy adds.
    rows = [
        [prompt["prompt"], prompt["instruction_id_list"], [{k: v for k, v in a.items() if v} for a in prompt["kwargs"]]]
        for prompt in prompts
    ]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode("utf-8")).hexdigest()[:16]
    return {"task": "ifeval", "data": digest, "num_prompts": len(rows), **checker.versions}
