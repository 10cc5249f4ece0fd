"""What a machine can do. No torch."""

from onecard.hardware.card import Card, CardHost, Source, context_bytes, pcie_bytes_per_s, usable_bytes, workspace_bytes
from onecard.hardware.card_search import all_cards, card_names, card_of, find_card
from onecard.hardware.heap import give_back_freed_memory, keep_freed_memory
from onecard.hardware.machine import Gpu, Machine, Platform
from onecard.hardware.probe import probe_machine

__all__ = [
    "Card",
    "CardHost",
    "Gpu",
    "Machine",
    "Platform",
    "Source",
    "all_cards",
    "card_names",
    "card_of",
    "context_bytes",
    "find_card",
    "give_back_freed_memory",
    "keep_freed_memory",
    "pcie_bytes_per_s",
    "probe_machine",
    "usable_bytes",
    "workspace_bytes",
]
