"""Is what was written what was trained? Weights within the rounding of their format, and logits beside logits."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.errors import CheckpointError
from onecard.model.generate import check_ids
from onecard.spec.handover import Fidelity

# Fixed for ever, so that differences of two exports can be compared.
TEXTS = (
    'The ferry left at 7:45, two hours late; nobody on the quay seemed to mind. "We\'ll wait," said the old man.\n',
    "山路很长，他们走了三天才到村口。老人说：“先喝口热茶，再说来意吧。”\n",
    "def area(r):\n    return 3.14159 * r ** 2  # naïve, but fine\n\tx = [1, 22, 333]; y = {'a': -0.5}\n",
)
_NUM_TOKENS = 64
# Unit roundoff of each type of weights, and the least number that it keeps this precisely (IEEE 754; bfloat16 has
# fp32's exponents).
_ROUNDOFF = {"f32": (0.0, 0.0), "bf16": (2.0**-8, 2.0**-133), "fp16": (2.0**-11, 2.0**-25)}
# q8_0: 32 values share a scale, their largest / 127 kept in fp16; a value is off by half a step and by the scale's own
# rounding, 127 times 2^-11 of a step at most; a scale below fp16's normal numbers is rounded to a multiple of 2^-24.
Q8_BLOCK = 32
_Q8_STEPS, _Q8_LEAST = 0.5 + 127 * 2.0**-11, 127 * 2.0**-25
# The largest difference of logits that is let through, as a share of their range. Rounding alone stays below a fifth of
# it on random and trained models (docs/export.md); adding an adapter to its weight in fp32 reorders sums.
LIMITS = {"f32": 1e-4, "bf16": 0.05, "fp16": 0.01, "q8_0": 0.1}


def make_probe(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    """Token ids [2, T] that depend on the tokenizer alone: fixed text, and tokens from the whole vocabulary.

    Raises:
        InputError: the tokenizer has tokens for the text that the model lacks.
    """
    length = min(_NUM_TOKENS, getattr(model.config, "max_position_embeddings", None) or _NUM_TOKENS)
    num_rows = model.get_input_embeddings().weight.shape[0]
    anywhere = torch.randint(num_rows, (2, length), generator=torch.Generator().manual_seed(0))
    ids = [token for text in TEXTS for token in tokenizer.encode(text, add_special_tokens=False)][:length]
    anywhere[0, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    check_ids(model, anywhere.tolist())
    return anywhere


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] in fp32."""
    out: Tensor = model.eval()(input_ids=ids_BT, use_cache=False).logits.float()
    return out


def compare(expected: Tensor, found: Tensor) -> Fidelity:
    """Sets logits [B, T, V] of what was read back beside those of the trained model."""
    expected = expected[..., : found.shape[-1]]
    return Fidelity(
        largest_difference=float((found - expected).abs().max()),
        logit_range=float(expected.max() - expected.min()),
        same_top_share=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        num_tokens=expected.shape[0] * expected.shape[1],
    )


def refuse_unlike(fidelity: Fidelity, dtype: str, *, is_rearranged: bool) -> None:
    """Refuses logits that are further from the trained model's than rounding explains.

    `is_rearranged`: an adapter was added to its weights, which reorders sums. Otherwise fp32 is exact.

    Raises:
        CheckpointError: too far, or no numbers.
    """
    limit = 0.0 if dtype == "f32" and not is_rearranged else LIMITS[dtype]
    if fidelity.share <= limit:  # false for NaN, too
        return
    remedy = "use --dtype f32 or bf16" if dtype in ("fp16", "q8_0") else "use --dtype f32" if dtype == "bf16" else ""
    raise CheckpointError(
        f"read back as {dtype}, logits differ from the trained model's by up to {fidelity.largest_difference:.3g}, "
        f"{fidelity.share:.2%} of their range; {limit:.2%} is the limit. Nothing was kept: "
        f"{remedy or 'this is a defect of onecard or of the disk; please report it'}"
    )


def refuse_other_weights(
    trained: Mapping[str, Tensor], read: Callable[[str], Tensor], dtype: str, block_dim: Callable[[str], int]
) -> None:
    """Refuses weights that differ from the trained ones by more than the rounding of their format, one by one.

    `block_dim(name)` is the dimension along which the values of a q8_0 block lie.

    Raises:
        CheckpointError: some do; the first is named.
    """
    for name, weight in trained.items():
        found = read(name).float()
        if found.shape != weight.shape or not bool(_is_near(found, weight, dtype, block_dim(name)).all()):
            raise CheckpointError(
                f"{name} was read back with other values than rounding to {dtype} gives. Nothing was kept: try again, "
                "on another disk if this one may be damaged; if it stays, please report it"
            )


def _is_near(found: Tensor, weight: Tensor, dtype: str, dim: int) -> Tensor:
    distance = (found - weight).abs()
    if dtype != "q8_0":
        share, least = _ROUNDOFF[dtype]
        return distance <= weight.abs() * share + least
    if weight.ndim < 2 or weight.shape[dim] % Q8_BLOCK:
        return distance <= weight.abs() * _ROUNDOFF["fp16"][0] + _ROUNDOFF["fp16"][1]
    blocks, distance = (part.movedim(dim, -1).unflatten(-1, (-1, Q8_BLOCK)) for part in (weight.abs(), distance))
    return distance <= blocks.amax(-1, keepdim=True) * (_Q8_STEPS / 127) + _Q8_LEAST
