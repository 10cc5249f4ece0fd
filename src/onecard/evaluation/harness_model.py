"""A loaded model as lm-evaluation-harness wants it. Import it only where that package is installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.errors import InputError
from onecard.evaluation.responses import Report
from onecard.model.attention import attention_of
from onecard.model.decoder import Decoder
from onecard.model.generate import AtOnce, Sampling, complete_ids, opening_of
from onecard.model.loss import find_head, score_tokens

# What the harness takes where a task does not say.
_MAX_NEW_TOKENS = 256
# A text to stop at may be spread over so many of the last tokens.
_NUM_TAIL_TOKENS = 16

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

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, report: Report | None = None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._model = model
        self._batch_size = batch_size
        self._report = report or (lambda done, total: None)
        self._opening = opening_of(model, tokenizer)
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

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Scored], **_: Any) -> list[tuple[float, bool]]:
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        found: dict[int, tuple[float, bool]] = {}
        self._model.eval()
        with attention_of(self._model, "sdpa"):
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                found.update(zip(batch, self._score([requests[index] for index in batch]), strict=True))
                self._report(len(found), len(order))
        return [found[index] for index in range(len(requests))]

    def _score(self, requests: list[Scored]) -> list[tuple[float, bool]]:
        """Scores each continuation; padding stands on the right, where causal attention never looks."""
        rows = [[*context, *continuation][-(self.max_length + 1) :] for _, context, continuation in requests]
        counts = [
            min(len(continuation), len(row) - 1) for (_, _, continuation), row in zip(requests, rows, strict=True)
        ]
        longest = max(map(len, rows)) - 1
        device = self._model.get_input_embeddings().weight.device
        ids_BT = torch.tensor([row[:-1] + [0] * (longest + 1 - len(row)) for row in rows], device=device)
        hidden_ND = Decoder(self._model, compiled=False)(ids_BT, None)
        places = [
            index * longest + len(row) - 1 - count + offset
            for index, (row, count) in enumerate(zip(rows, counts, strict=True))
            for offset in range(count)
        ]
        targets_N = torch.tensor(
            [token for row, n in zip(rows, counts, strict=True) for token in row[-n:]], device=device
        )
        hidden_nD = hidden_ND.index_select(0, torch.tensor(places, device=device))
        scores_N, verdicts_N = score_tokens(hidden_nD, find_head(self._model), targets_N)
        parts = zip(scores_N.double().cpu().split(counts), verdicts_N.cpu().split(counts), strict=True)
        return [(float(scores.sum()), bool(verdicts.all())) for scores, verdicts in parts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        settings = [_Settings.of(request.args[1]) for request in requests]
        groups: dict[str, list[int]] = {}
        for index, entry in enumerate(settings):
            groups.setdefault(repr(entry), []).append(index)
        texts: dict[int, str] = {}
        for group in groups.values():

            def end(place: int, new: list[int], group: list[int] = group) -> None:
                texts[group[place]] = settings[group[place]].cut(self.tokenizer.decode(new, skip_special_tokens=True))
                self._report(len(texts), len(requests))

            self._generate([encoded[index] for index in group], settings[group[0]], AtOnce(self._batch_size, end))
        return [texts[index] for index in range(len(requests))]

    def _generate(self, encoded: list[list[int]], settings: "_Settings", at_once: AtOnce) -> None:
        room = self.max_length - settings.sampling.max_new_tokens
        if room < 1:
            raise InputError(
                f"a task asks for responses of {settings.sampling.max_new_tokens:,} tokens, but the model has "
                f"{self.max_length:,} positions: evaluate a model with more (max_seq_length of its training)"
            )

        def is_over(new: Sequence[int]) -> bool:
            tail = self.tokenizer.decode(new[-_NUM_TAIL_TOKENS:])
            return any(word and word in tail for word in settings.until)

        complete_ids(
            self._model,
            [ids[-room:] for ids in encoded],
            [self.eot_token_id],
            settings.sampling,
            is_over if settings.until else None,
            at_once,
        )
