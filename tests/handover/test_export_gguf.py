"""GGUF files hold the model that was trained, and the tokenizer it was trained with."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import onecard
from onecard.errors import CheckpointError, InputError
from onecard.handover.fidelity import refuse_other_weights
from onecard.handover.gguf_layout import Placement, check_architecture
from onecard.handover.gguf_tokens import Vocabulary, make_vocabulary
from onecard.model.folder import load_plain

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

IDS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
# transformers' own reader takes these for granted.
SIZES = {"qwen3": {"head_dim": 128, "hidden_size": 128}, "gpt2": {"max_position_embeddings": 1024}}
SAMPLES = ["don't  stop: 12,345 foxes!\n\n\tÜber 3½ km", "山路很长，他们走了三天。数字１２３ and mixed 中文 text 🎉"]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(input_ids=IDS).logits
    return out


def file_in(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_f32_is_exact_and_another_reader_agrees(
    family: str, is_tied: bool, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model_folder(family, tie_word_embeddings=is_tied, **SIZES.get(family, {}))
    result = onecard.export(folder, "gguf", dtype="f32", output=tmp_path / "out")
    assert result.fidelity.largest_difference == 0.0
    names = {tensor.name for tensor in gguf.GGUFReader(file_in(tmp_path / "out")).tensors}
    assert ("output.weight" in names) is not is_tied
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=file_in(tmp_path / "out").name, dtype=torch.float32
    )
    expected = logits(load_plain(folder, torch.float32))
    torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 0.02), ("fp16", 0.003), ("q8_0", 0.05)])
def test_rounding_is_stated(dtype: str, limit: float, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    result = onecard.export(model_folder("llama"), "gguf", dtype=dtype, output=tmp_path / "out")
    assert 0 < result.fidelity.share < limit
    assert result.num_bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != "README.md")


def test_rows_without_whole_blocks_are_said_and_kept_in_fp16(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    result = onecard.export(model_folder("llama"), "gguf", dtype="q8_0", output=tmp_path / "out")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file_in(tmp_path / "out")).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"  # 80 values to a row
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert any("multiple of 32" in note for note in result.notes)


def test_heads_are_turned_and_turned_back() -> None:
    weight = torch.arange(12.0)[:, None]
    turned = Placement("q", "rotated", 2).to_file(weight)
    assert turned[:6, 0].tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(Placement("q", "rotated", 2).from_file(turned), weight)


def test_a_changed_weight_is_found() -> None:
    weight = torch.linspace(-1, 1, 64).reshape(2, 32)
    for dtype, slip in (("f32", 1e-6), ("bf16", 0.01), ("fp16", 1e-3), ("q8_0", 0.01)):
        refuse_other_weights({"w": weight}, lambda _: weight, dtype, lambda _: -1)
        changed = weight.clone()
        changed[1, 31] += slip
        with pytest.raises(CheckpointError, match="w was read back"):
            refuse_other_weights({"w": weight}, lambda _, c=changed: c, dtype, lambda _: -1)


def test_the_file_cuts_text_as_the_tokenizer_does(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("qwen2")
    onecard.export(folder, "gguf", dtype="f32", output=tmp_path / "out")
    reader = gguf.GGUFReader(file_in(tmp_path / "out"))
    encode, tokenizer = Vocabulary.read(reader).encoder(), AutoTokenizer.from_pretrained(folder)
    for text in SAMPLES:
        assert encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == 308
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is True  # its documents began with one
    assert reader.get_field("tokenizer.ggml.bos_token_id").contents() == tokenizer.bos_token_id


def piece_tokenizer() -> Any:
    """A tokenizer of Llama 2's kind: pieces with ranks, a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrst"]
    merges = [("▁", "a"), ("b", "c"), ("a", "b"), ("ab", "c"), ("▁a", "bc"), ("d", "e"), ("▁", "b"), ("c", "c")]
    vocabulary = {piece: index for index, piece in enumerate([*symbols, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_pieces_with_scores_are_joined_as_their_merges_were() -> None:
    tokenizer = piece_tokenizer()
    vocabulary = make_vocabulary(tokenizer, 0)
    assert vocabulary.model == "llama"
    for text in ("abc abcc de bcbc aabbccdd", "a山b", "  abc", *SAMPLES):
        assert vocabulary.encoder()(text) == tokenizer.encode(text, add_special_tokens=False), text


def test_what_llama_cpp_computes_otherwise_is_refused_at_once(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="gelu"):
        onecard.export(model_folder("llama", hidden_act="gelu"), "gguf", output=tmp_path / "out")
    with pytest.raises(InputError, match="these can: llama, qwen2, qwen3, gpt2"):
        check_architecture(AutoConfig.for_model("gemma2"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_not_kept(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = gguf.quants.quantize

    def worse(values: Any, kind: Any) -> Any:
        values = values.copy()
        values.flat[0] += struct.unpack("<f", struct.pack("<f", 0.5))[0]
        return quantize(values, kind)

    monkeypatch.setattr(gguf.quants, "quantize", worse)
    with pytest.raises(CheckpointError, match="Nothing was kept"):
        onecard.export(model_folder("llama"), "gguf", dtype="f32", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
