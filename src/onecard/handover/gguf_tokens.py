"""A tokenizer in the words of GGUF, and back to ids as llama.cpp would make them.

Two kinds are written. `gpt2`: BPE over bytes with merges, where the name of a pre-tokenizer stands for the pattern that
cuts text into words. `llama`: pieces with scores as SentencePiece has them; of all neighbours, those are joined whose
piece has the highest score.
"""

import heapq
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from onecard.errors import InputError

# Of GGUF's enumeration `TokenType`.
NORMAL, TOKEN_UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenizers that llama.cpp knows by name (src/llama-vocab.cpp) as tokenizer.json writes them: what stands before
# the bytes, and whether GPT-2's own pattern cuts words. The patterns are those of Qwen2's and Llama 3's tokenizer.json.
_BEFORE_BYTES: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "gpt-2": (None, True),
    "smollm": ({"type": "Digits", "individual_digits": True}, True),
    "qwen2": ({"type": "Split", "pattern": {"Regex": _WORDS.replace("DIGITS", "")}}, False),
    "llama-bpe": ({"type": "Split", "pattern": {"Regex": _WORDS.replace("DIGITS", "{1,3}")}}, False),
}
_SPLIT_DEFAULTS = {"behavior": "Isolated", "invert": False}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types; merges and the name of a pre-tokenizer (`gpt2`), or scores (`llama`)."""

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    pre: str = "default"
    adds_space: bool = False

    def add_to(self, writer: Any) -> None:
        """Adds it to a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        else:
            writer.add_token_merges(self.merges)

    @classmethod
    def read(cls, reader: Any) -> "Vocabulary":
        """Reads it from a GGUF file."""

        def get(key: str, default: Any) -> Any:
            field = reader.get_field(f"tokenizer.ggml.{key}")
            return default if field is None else field.contents()

        return cls(
            model=get("model", ""),
            tokens=get("tokens", []),
            types=get("token_type", []),
            merges=get("merges", []),
            scores=get("scores", []),
            pre=get("pre", "default"),
            adds_space=get("add_space_prefix", False),
        )

    def encoder(self) -> Callable[[str], list[int]]:
        """Gives a function from text without special tokens to ids, made from nothing but what stands in the file."""
        return self._byte_encoder() if self.model == "gpt2" else self._piece_encoder()

    def _byte_encoder(self) -> Callable[[str], list[int]]:
        from tokenizers import Tokenizer

        before, is_cut = _BEFORE_BYTES[self.pre]
        if before is not None and before["type"] == "Split":
            before = before | _SPLIT_DEFAULTS
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": is_cut}
        steps = [to_bytes] if before is None else [before, to_bytes]
        content = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "model": {
                "type": "BPE",
                "vocab": {token: index for index, token in enumerate(self.tokens)},
                "merges": [merge.split(" ") for merge in self.merges],
                "ignore_merges": self.pre == "llama-bpe",
            },
        }
        backend = Tokenizer.from_str(json.dumps(content))
        return lambda text: list(backend.encode(text, add_special_tokens=False).ids)

    def _piece_encoder(self) -> Callable[[str], list[int]]:
        known = {
            token: index
            for index, (token, kind) in reversed(list(enumerate(zip(self.tokens, self.types, strict=True))))
            if kind != CONTROL
        }

        def encode(text: str) -> list[int]:
            pieces = _join((_SPACE if self.adds_space else "") + text.replace(" ", _SPACE), known, self.scores)
            return [index for piece in pieces for index in _ids_of(piece, known)]

        return encode


def _ids_of(piece: str, known: dict[str, int]) -> list[int]:
    return [known[piece]] if piece in known else [known[f"<0x{byte:02X}>"] for byte in piece.encode("utf-8")]


def _join(text: str, known: dict[str, int], scores: list[float]) -> list[str]:
    """Joins neighbours, the highest score first and of equals the leftmost, until no joined piece is known."""
    pieces = list(text)
    following = [*range(1, len(pieces)), -1]
    preceding = list(range(-1, len(pieces) - 1))
    queue: list[tuple[float, int, str, int]] = []

    def offer(left: int) -> None:
        if left >= 0 and (right := following[left]) >= 0 and (joined := pieces[left] + pieces[right]) in known:
            heapq.heappush(queue, (-scores[known[joined]], left, joined, right))

    for index in range(len(pieces)):
        offer(index)
    while queue:
        _, left, joined, right = heapq.heappop(queue)
        if following[left] != right or not pieces[left] or pieces[left] + pieces[right] != joined:
            continue  # one of the two has become part of another piece
        pieces[left], pieces[right] = joined, ""
        following[left] = following[right]
        if following[left] >= 0:
            preceding[following[left]] = left
        offer(preceding[left])
        offer(left)
    return [piece for piece in pieces if piece]


def make_vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Vocabulary:
    """Writes a tokenizer as GGUF has it; rows of the embedding beyond its tokens are unused ones.

    Raises:
        InputError: a kind of tokenizer that llama.cpp does not know, or whose name there is not known here.
    """
    if not tokenizer.is_fast:
        raise InputError("--to gguf: the tokenizer has no tokenizer.json, which its merges are read from")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = content["model"], content["added_tokens"]
    if model["type"] != "BPE" or not model["merges"]:
        kind = "one without merges (char, bytes)" if model["type"] == "BPE" else model["type"]
        raise InputError(
            f"--to gguf: the tokenizer is {kind}; only BPE can be written. Export it with --to hf, an adapter with "
            "--to merged"
        )
    ids = model["vocab"] | {token["content"]: token["id"] for token in added}
    tokens = [f"[PAD{index}]" for index in range(max(num_rows, 1 + max(ids.values())))]
    types = [UNUSED] * len(tokens)
    for token, index in ids.items():
        tokens[index], types[index] = token, NORMAL
    for entry in added:
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if _is_bytewise(content):
        return Vocabulary("gpt2", tokens, types, merges, [], _name_of(content))
    return _with_scores(content, tokens, types, merges)


def _is_bytewise(content: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(content["pre_tokenizer"]))


def _steps(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if processor is None:
        return []
    return list(processor.get("pretokenizers") or processor.get("normalizers") or [processor])


def _name_of(content: dict[str, Any]) -> str:
    *before, last = _steps(content["pre_tokenizer"])
    normalizers = [step["type"] for step in _steps(content["normalizer"])]
    if normalizers in ([], ["NFC"]) and not last.get("add_prefix_space") and len(before) <= 1:
        # tokenizer.json says of some patterns how they split, which all of these do alike.
        found = {key: value for key, value in before[0].items() if key not in _SPLIT_DEFAULTS} if before else None
        for name, (expected, is_cut) in _BEFORE_BYTES.items():
            if found == expected and last.get("use_regex", True) == is_cut:
                return name
    raise InputError(
        "--to gguf: the tokenizer cuts text into words in a way that has no name here; known are those of "
        f"{', '.join(_BEFORE_BYTES)}. Export it with --to hf, and convert that with llama.cpp's own script"
    )


def _with_scores(content: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]) -> Vocabulary:
    steps = [*_steps(content["normalizer"]), *_steps(content["pre_tokenizer"])]
    kinds = {step["type"] for step in steps}
    if not content["model"].get("byte_fallback") or not kinds <= {"Prepend", "Replace", "Metaspace"}:
        raise InputError(
            "--to gguf: the tokenizer is neither BPE over bytes (GPT-2, Qwen, Llama 3) nor like SentencePiece's with a "
            "token for each byte (Llama 2). Export it with --to hf, an adapter with --to merged"
        )
    adds_space = any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
    places = {token: index for index, token in enumerate(tokens)}
    scores = [0.0] * len(tokens)
    for rank, merge in enumerate(merges):
        # Several pairs may make one piece; the first is the rank of all.
        place = places.get(merge.replace(" ", ""))
        if place is not None and scores[place] == 0.0:
            scores[place] = -1.0 - rank
    unknown = places.get(content["model"].get("unk_token") or "")
    for index, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x"):
            types[index] = BYTE
    if unknown is not None:
        types[unknown] = TOKEN_UNKNOWN
    return Vocabulary("llama", tokens, types, [], scores, adds_space=adds_space)
