"""Which tokens the batch at a position sees: a pure function of (seed, position), so a resume starts anywhere at once.

    position ─mix─► source, index in it ─► epoch, rank ─permute─► item    of text: block ─► first token of the block

Every epoch orders the items by its own permutation, and shifts blocks by its own offset, so that their borders move.
"""

from collections.abc import Sequence

import numpy as np

from onecard.errors import DataError

_PERMUTATION_ROUNDS = 6
# Shares are exact where they are multiples of 1/period for a period up to this, else rounded to it.
_LONGEST_PERIOD = 4096


class IndexSampler:
    """The order in which the items of one or several sources come, `num_items` of each: every epoch is a permutation.

    Several sources are mixed by weight: the items of a source before any position are within 1 of its share. Time and
    memory of any look-up do not depend on the position.
    """

    def __init__(self, num_items: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True) -> None:
        self.seed = seed
        self.shuffle = shuffle
        self._num_items = np.asarray(num_items, dtype=np.int64)
        self._pattern, self._ranks, self._shares = _mixing_pattern(np.asarray(weights, dtype=np.float64))

    @property
    def items_per_epoch(self) -> int:
        return int(self._num_items.sum())

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives for each position [n] its source [n] and the item [n] there, both int64."""
        source, item, _ = self.locate_keyed(positions)
        return source, item

    def locate_keyed(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `locate`, with a random number [n] (uint64) of source and epoch."""
        positions = np.atleast_1d(np.asarray(positions, dtype=np.int64))
        round_index, slot = np.divmod(positions, len(self._pattern))
        source = self._pattern[slot]
        index = round_index * self._shares[source] + self._ranks[slot]
        num_items = self._num_items[source]
        epoch, rank = np.divmod(index, num_items)
        key = _hash(
            _hash(np.full_like(positions, self.seed).view(np.uint64) ^ _hash(source.astype(np.uint64)))
            ^ epoch.astype(np.uint64)
        )
        return source, permute(rank, num_items, key) if self.shuffle else rank, key


class BlockSampler:
    """The order of blocks of `block_length` tokens (one more for the last target) over one or several sources.

    `blocks_per_epoch` is the number of blocks all sources have together. Raises DataError for a source shorter than
    one block.
    """

    def __init__(
        self,
        num_tokens_per_source: Sequence[int],
        weights: Sequence[float],
        block_length: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        _check_lengths(num_tokens_per_source, block_length)
        self.block_length = block_length
        tokens = np.asarray(num_tokens_per_source, dtype=np.int64)
        if shuffle:
            # One block fewer than fit keeps a whole block length free for the offset.
            num_blocks = np.maximum((tokens - block_length) // block_length, 1)
            self._num_offsets = np.minimum(block_length, tokens - num_blocks * block_length)
        else:
            num_blocks = (tokens - 1) // block_length
            self._num_offsets = np.ones_like(tokens)
        self._order = IndexSampler(num_blocks.tolist(), weights, seed, shuffle)

    @property
    def blocks_per_epoch(self) -> int:
        return self._order.items_per_epoch

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives for each position [n] its source [n] and the first token [n] of its block there, both int64."""
        source, block, key = self._order.locate_keyed(positions)
        offset = (_hash(key ^ np.uint64(0xA5A5A5A5)) % self._num_offsets[source].astype(np.uint64)).astype(np.int64)
        return source, offset + block * self.block_length


def permute(ranks: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Maps each rank in [0, size) one-to-one into [0, size), by a Feistel network that is walked until it lands inside.

    All arrays [n]. The power of two that holds the size is less than twice as large, so a walk takes under two turns on
    average. Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    num_bits = _bit_length(sizes - 1)
    right_bits = ((num_bits + 1) // 2).astype(np.uint64)
    left_bits = num_bits.astype(np.uint64) - right_bits
    round_keys = np.stack([_hash(keys + np.uint64(turn)) for turn in range(_PERMUTATION_ROUNDS)])
    values, limits = ranks.astype(np.uint64), sizes.astype(np.uint64)
    outside = np.arange(len(values))
    while outside.size:
        walked = _feistel(values[outside], left_bits[outside], right_bits[outside], round_keys[:, outside])
        values[outside] = walked
        outside = outside[walked >= limits[outside]]
    return values.astype(np.int64)


def heldout_blocks(num_tokens: int, block_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives first token [n] and number of targets [n] of blocks covering every target once, the last maybe shorter."""
    num_targets = max(num_tokens - 1, 0)
    starts = np.arange(0, num_targets, block_length, dtype=np.int64)
    return starts, np.minimum(block_length, num_targets - starts)


def _check_lengths(num_tokens_per_source: Sequence[int], block_length: int) -> None:
    if block_length < 1:
        raise DataError(f"block length {block_length}: a block needs at least one token. Set max_length to 1 or more.")
    short = [(index, count) for index, count in enumerate(num_tokens_per_source) if count < block_length + 1]
    if short:
        found = ", ".join(f"source {index} has {count:,} training tokens" for index, count in short)
        raise DataError(
            f"{found}, fewer than one block of {block_length:,} and its last target. Give more text, set a smaller"
            " max_length, or hold out less."
        )


def _mixing_pattern(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lays out one period of the mix: source per slot, its running number there, and slots per source.

    Tijdeman, "The chairman assignment problem", 1980: no prefix is further than 1 - 1/(2n-2) from its shares.
    """
    shares = _integer_shares(weights / weights.sum())
    period, num_sources = int(shares.sum()), len(shares)
    if num_sources == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)
    pattern, ranks = np.empty(period, np.int64), np.empty(period, np.int64)
    given = np.zeros(num_sources, np.int64)
    slack = 2 * num_sources - 2
    for slot in range(period):
        owed = (slot + 1) * shares - given * period
        # In units of 1 / (slack · period): a source may be chosen once it is owed 1 / slack.
        deadline = np.where(slack * owed >= period, (period * (slack - 1) - slack * owed) / shares, np.inf)
        chosen = int(np.argmin(deadline))
        pattern[slot], ranks[slot] = chosen, given[chosen]
        given[chosen] += 1
    return pattern, ranks, shares


def _integer_shares(shares: np.ndarray) -> np.ndarray:
    periods = np.arange(1, _LONGEST_PERIOD + 1)[:, None]
    scaled = periods * shares
    exact = np.abs(scaled - np.round(scaled)).max(axis=1) < 1e-9 * periods[:, 0]
    row = int(np.argmax(exact)) if exact.any() else _LONGEST_PERIOD - 1
    counts = np.maximum(np.round(scaled[row]), 1).astype(np.int64)
    return counts // np.gcd.reduce(counts)


def _bit_length(values: np.ndarray) -> np.ndarray:
    # Exact below 2**53, far above any number of blocks.
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _feistel(values: np.ndarray, left_bits: np.ndarray, right_bits: np.ndarray, round_keys: np.ndarray) -> np.ndarray:
    masks = [(np.uint64(1) << bits) - np.uint64(1) for bits in (left_bits, right_bits)]
    left, right = values >> right_bits, values & masks[1]
    # The halves swap their widths in every round, so an even number of rounds ends as it began.
    for turn, keys in enumerate(round_keys):
        mixed = (right ^ keys) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed >> np.uint64(32)) & masks[turn % 2])
    return (left << right_bits) | right


def _hash(values: np.ndarray) -> np.ndarray:
    """Mixes 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
