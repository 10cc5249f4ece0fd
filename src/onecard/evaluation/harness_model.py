"""A loaded model as lm-evaluation-harness wants it. Import it only where that package is installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from onecard.errors import InputError
from onecard.evaluation.task import Subject
from onecard.evaluation.work import Continuations, Likelihoods, Report
from onecard.model.generate import Sampling, opening_of

# What the harness takes where a task does not say.
_MAX_NEW_TOKENS = 256

Scored = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class _Settings:
    """How one request is to be generated."""

    until: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> "_Settings":
        until = arguments.get("until") or []
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        limit = next((arguments[name] for name in names if arguments.get(name) is not None), _MAX_NEW_TOKENS)
        temperature = float(arguments.get("temperature") or 0.0) if arguments.get("do_sample") else 0.0
        sampling = Sampling(int(limit), temperature, arguments.get("top_k") or None, arguments.get("top_p") or None)
        return cls(tuple([until] if isinstance(until, str) else until), sampling)

    def cut(self, text: str) -> str:
        for word in filter(None, self.until):
            text = text.split(word)[0]
        return text


class HarnessModel(TemplateLM):
    """Log-likelihoods by hidden states and a head in chunks, generation of many texts at once.

    A text begins as the model's training text did, which for a published model is what its tokenizer adds.
    """

    backend = "causal"

    def __init__(self, subject: Subject, batch_size: int, report: Report | None = None) -> None:
        super().__init__()
        self.tokenizer = subject.tokenizer
        self._subject = subject
        self._model = model = subject.model
        self._batch_size = batch_size
        self._report = report or (lambda done, total: None)
        self._opening = opening_of(model, self.tokenizer)
        self.max_length = int(getattr(model.config, "max_position_embeddings", None) or 2048)

    @property
    def eot_token_id(self) -> int:
        found = self.tokenizer.eos_token_id
        return int(self._model.config.eos_token_id if found is None else found)

    @property
    def prefix_token_id(self) -> int:
        if self._opening:
            return self._opening[0]
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encodes a text with what stands before one, unless it is there already."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        if add_special_tokens is False or ids[: len(self._opening)] == self._opening:
            return ids
        return [*self._opening, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[Scored] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((("", ""), context, continuation))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **_: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = self._subject.perform(Likelihoods(pairs, self.max_length, self._batch_size), self._report)
        return [(value, is_likeliest) for value, is_likeliest in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        settings = [_Settings.of(request.args[1]) for request in requests]
        groups: dict[str, list[int]] = {}
        for index, entry in enumerate(settings):
            groups.setdefault(repr(entry), []).append(index)
        texts: dict[int, str] = {}
        for group in groups.values():
            own, num_before = settings[group[0]], len(texts)

            def report(done: int, total: int, num_before: int = num_before) -> None:
                self._report(num_before + done, len(requests))

            found = self._generate([encoded[index] for index in group], own, report)
            for index, new in zip(group, found, strict=True):
                texts[index] = own.cut(self.tokenizer.decode(new, skip_special_tokens=True))
        return [texts[index] for index in range(len(requests))]

    def _generate(self, encoded: list[list[int]], settings: "_Settings", report: Report) -> list[list[int]]:
        room = self.max_length - settings.sampling.max_new_tokens
        if room < 1:
            raise InputError(
                f"a task asks for responses of {settings.sampling.max_new_tokens:,} tokens, but the model has "
                f"{self.max_length:,} positions: evaluate a model with more (max_seq_length of its training)"
            )
        prompts = [ids[-room:] for ids in encoded]
        work = Continuations(prompts, [self.eot_token_id], settings.sampling, self._batch_size, settings.until)
        return self._subject.perform(work, report)
