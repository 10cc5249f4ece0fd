"""Two small tokenizers of the kinds that chat models use: of bytes (GPT-2), of pieces with bytes below (Llama)."""

import json
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from onecard.data.tokenizer import train_tokenizer

TEXT = (
    "user assistant system\nHello, how are you? I am fine. User: Assistant: [INST] think start of turn header 你好 " * 8
)
SPECIALS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "<|start|>",
]
# Phi-3 marks its tokens so that they swallow the white space that follows.
GREEDY = ["<|user|>", "<|system|>", "<|end|>", "<|assistant|>"]


def with_specials(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIALS], special_tokens=True)
    greedy = [AddedToken(f"{name}", normalized=False, special=True, rstrip=True) for name in GREEDY]
    tokenizer.add_tokens(greedy, special_tokens=True)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in ("<think>", "</think>")])
    return tokenizer


def gpt2_like() -> PreTrainedTokenizerBase:
    return with_specials(train_tokenizer("bpe", [TEXT], 320))


def llama_like() -> PreTrainedTokenizerBase:
    """Spaces become ▁, one stands before the text, and characters beyond the vocabulary fall back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(TEXT.replace(" ", "▁")))]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = []
    for pair in ("▁ H", "l l", "▁ a", "h i", "▁ [", "e r", "▁ I"):
        left, right = pair.split()
        if {left, right} <= vocabulary.keys():
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for name in ("<unk>", "<s>", "</s>"):
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True)])
    return with_specials(
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )
    )


MAKERS = {"gpt2": gpt2_like, "llama": llama_like}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerBase]:
    return lambda name: MAKERS[name]()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return gpt2_like()


@pytest.fixture(params=MAKERS)
def each_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return MAKERS[request.param]()


@pytest.fixture
def naive_llama() -> PreTrainedTokenizerBase:
    """A Llama tokenizer.json on its own, whose special tokens are marked as normalized."""
    content = json.loads(llama_like().backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["normalized"] = token["content"] in ("<s>", "</s>")
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
