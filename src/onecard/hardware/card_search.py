"""Finding cards: by the name a person types, or by what the driver says."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from onecard.errors import InputError
from onecard.hardware.card import Card
from onecard.hardware.catalogue import shipped_cards
from onecard.hardware.local_cards import read_local_cards
from onecard.hardware.machine import Gpu

# Drivers show 15/16 of the memory where error correction takes its share (see has_inline_ecc); the sizes of cards with
# one name differ by at least a sixth.
_MEMORY_TOLERANCE = 0.08
_LEFT_OUT = {"nvidia", "geforce", "tesla", "quadro", "gpu", "generation"}


def all_cards() -> tuple[Card, ...]:
    """Gives the cards of the catalogue, then the local ones.

    Raises:
        InputError: the file of local rows is damaged.
    """
    return shipped_cards() + read_local_cards()


def card_names() -> list[str]:
    """Lists the names that `find_card` takes in any case."""
    return [card.key for card in all_cards()]


def find_card(name: str) -> Card:
    """Finds a card by its key, an alias or its driver's name; case, spaces and dashes do not matter.

    Raises:
        InputError: no card has that name, or several have. A card is never guessed.
    """
    cards = all_cards()
    for card in cards:
        if name.strip().lower() == card.key:
            return card
    wanted = _squeeze(name)
    found = [card for card in cards if not card.is_local and wanted in _names_of(card)]
    found = found or [card for card in cards if wanted in _names_of(card)]
    if len(found) == 1:
        return found[0]
    longer = [card for card in cards if wanted in _stems_of(card)]
    if found or longer:
        candidates = ", ".join(dict.fromkeys(card.key for card in (*found, *longer)))
        raise InputError(f"card {name!r} may be one of several: {candidates}. Name the one you mean")
    raise InputError(f"card {name!r} is not in the catalogue{_nearest(wanted, cards)}")


def card_of(gpu: Gpu) -> Card | None:
    """Finds the row of a card in the machine by its driver's name, memory and compute capability.

    A local row comes before the catalogue's: it was measured with the power and cooling of this machine. None means
    that the card is unknown, or only a part of it is visible (MIG).
    """
    name = _squeeze(gpu.name)
    for card in sorted(all_cards(), key=lambda card: not card.is_local):
        if (
            name in map(_squeeze, card.driver_names)
            and abs(gpu.total_bytes - card.memory_bytes) <= _MEMORY_TOLERANCE * card.memory_bytes
            and gpu.compute_capability == card.compute_capability
        ):
            return card
    return None


def _names_of(card: Card) -> set[str]:
    """All squeezed names of a card, each also without the family's prefix: people type 4060."""
    names = {_squeeze(name) for name in (card.key, card.name, *card.aliases, *card.driver_names)}
    return names | {name[3:] for name in names if name.startswith(("rtx", "gtx"))}


def _stems_of(card: Card) -> set[str]:
    """All beginnings of a card's key, by whole words: `a100` of `a100-40gb`, but not `h20` of `h200`."""
    words = card.key.split("-")
    stems = {"".join(words[:count]) for count in range(1, len(words))}
    return stems | {stem[3:] for stem in stems if stem.startswith(("rtx", "gtx"))} - {""}


def _squeeze(name: str) -> str:
    """`NVIDIA GeForce RTX 4060 Laptop GPU` and `rtx-4060-laptop` -> `rtx4060laptop`."""
    return "".join(word for word in re.split(r"[^a-z0-9]+", name.lower()) if word not in _LEFT_OUT)


def _nearest(wanted: str, cards: Iterable[Card]) -> str:
    keys = {name: card.key for card in cards for name in _names_of(card)}
    near = dict.fromkeys(keys[name] for name in get_close_matches(wanted, keys, n=4, cutoff=0.7))
    likely = f"; near to it: {', '.join(near)}" if near else ""
    return (
        f"{likely}. `onecard cards` lists all cards; "
        "on the machine that has it, `onecard cards --measure` times it and writes a row"
    )
