"""Tokens that a base has rows for and never trained: its weights tell them.

    the signs, in the embedding or in the head        where they come from
    a row of one value                                zeros, as reserved tokens are saved
    a row hardly different from another one           tokens that only ever lose: softmax pushes all of them one way
    a row at the mean of all                          tokens added and never learned (transformers' mean_resizing)
    the length of random numbers, unlike the others   as initialised
    a row much shorter than the others                shrunk by weight decay

After Land and Bartolo 2024 (arXiv 2405.05417), who tell them by their length and by how alike they are.
"""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from onecard.model.weight_files import find_weight_files, read_headers

# Of a row's length: how far its nearest neighbour is. In a model of 260K parameters 51% of the rows are nearer, the
# others at 0.4 and more.
_NEAR = 0.1
# Of the median distance to the mean of all rows, and of the median length.
_AT_MEAN, _SHORT = 0.1, 0.25
# How much longer or shorter the median row must be for random numbers to stand out.
_UNLIKE_RANDOM = 1.5
_ROWS_AT_ONCE = 16384


def find_untrained(folder: Path, tokens: Sequence[int], *, vocab_size: int, init_std: float) -> dict[int, str]:
    """Finds those of the tokens that the model in a folder never trained, each with the sign of it.

    Reads embedding and head once: about a second for 300 million parameters. `init_std` is what they were drawn with.

    Raises:
        CheckpointError: no weights, or damaged ones.
    """
    known = [token for token in tokens if token < vocab_size]
    found: dict[int, str] = {}
    for weight_VD in _read_matrices(folder, vocab_size) if known else ():
        for token, sign in _find_signs(weight_VD, known, init_std).items():
            found.setdefault(token, sign)
    return {token: found[token] for token in known if token in found}


def _read_matrices(folder: Path, vocab_size: int) -> Iterator[Tensor]:
    """The matrices with a row for each token."""
    files = find_weight_files(folder)
    if files[0].suffix == ".safetensors":
        for stored in read_headers(files):
            if len(stored.shape) == 2 and stored.shape[0] == vocab_size:
                with safe_open(stored.file, framework="pt") as opened:
                    yield opened.get_tensor(stored.name)
        return
    for file in files:
        for tensor in torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file)).values():
            if tensor.ndim == 2 and tensor.shape[0] == vocab_size:
                yield tensor


def _find_signs(weight_VD: Tensor, tokens: list[int], init_std: float) -> dict[int, str]:
    rows_ND = weight_VD[tokens].float()
    mean_D = weight_VD.float().mean(0)
    norms, offsets, nearest = [], [], torch.full((len(tokens),), torch.inf)
    for first, part_CD in enumerate(weight_VD.split(_ROWS_AT_ONCE)):
        part_CD = part_CD.float()
        norms.append(part_CD.norm(dim=1))
        offsets.append((part_CD - mean_D).norm(dim=1))
        distances_NC = torch.cdist(rows_ND, part_CD, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.tensor(tokens)[:, None] == torch.arange(len(part_CD)) + first * _ROWS_AT_ONCE
        nearest = torch.minimum(nearest, distances_NC.masked_fill(own, torch.inf).amin(1))
    norms_V, offsets_V = torch.cat(norms), torch.cat(offsets)
    usual, usual_offset = float(norms_V.median()), float(offsets_V.median())
    random = init_std * weight_VD.shape[1] ** 0.5
    # Five standard deviations of the length of so many random numbers.
    tolerance = 5 * init_std / 2**0.5
    stands_out = max(usual, random) > _UNLIKE_RANDOM * min(usual, random)
    signs = {}
    for place, token in enumerate(tokens):
        norm = float(norms_V[token])
        if bool((rows_ND[place] == rows_ND[place, 0]).all()):
            signs[token] = "its row is one value throughout"
        elif float(nearest[place]) < _NEAR * norm:
            signs[token] = "its row is hardly different from that of another token"
        elif float(offsets_V[token]) < _AT_MEAN * usual_offset:
            signs[token] = "its row is the mean of all"
        elif stands_out and abs(norm - random) < tolerance:
            signs[token] = "its row is as long as the random numbers it began with"
        elif norm < _SHORT * usual:
            signs[token] = "its row is much shorter than others"
    return signs
