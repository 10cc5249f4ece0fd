"""How long ranks take to sum and to gather tensors: rings of cards, by arithmetic.

    card ──► card ──► card ──┐    to sum S bytes each of N ranks passes 2 (N - 1) / N x S on, to gather or to
      ▲                      ▼    scatter them half as many; the slowest link decides, and every hop costs
    card ◄── card ◄── card ◄─┘    its latency

Of rings NCCL makes the most for large tensors; for small ones on many ranks it has trees, which are faster. No figure
here was measured with onecard: bands are wide, and every plan says what it took for granted.
"""

from dataclasses import dataclass

from onecard.hardware import Card, pcie_bytes_per_s
from onecard.spec import CardGroup
from onecard.units import MIB

# A machine of cards has at most eight as a rule; where fewer share a run, they are in one.
CARDS_PER_MACHINE = 8
# What NCCL's own buffers take of each card, outside PyTorch's allocator: assumed, and kept free.
NCCL_BYTES = 256 * MIB
# NCCL's rings with whole packets (tuning.cc, as in PyTorch 2.13's torch/_inductor/comm_analysis.py): start, and a hop
# over NVLink, PCIe and a network.
_START_S, _NVLINK_HOP_S, _PCIE_HOP_S, _NETWORK_HOP_S = 8.4e-6, 3.4e-6, 5.7e-6, 14e-6
# Of the slot's rate each way, what comes through where cards reach one another by way of the host: the same file has
# 10 and 24 GB/s in two places, 0.32 and 0.76 of a PCIe 4.0 x16 slot; between them, as a geometric mean.
_SLOT_SHARE, _SLOT_SHARES = 0.49, (0.32, 0.76)
# A card whose slot is not known: from half of a PCIe 3.0 x8 slot to that of 4.0 x16, and the lower of the two above.
_UNKNOWN_LINK = (10e9, 2.5e9, 24e9)
# One adapter of 200 Gb/s a machine (that file's figure for Ampere) where nothing is said; between 10 Gb/s Ethernet and
# eight such adapters.
_UNKNOWN_NETWORK = (25e9, 1.25e9, 200e9)
# Of rates that are given, or that NCCL has for NVLink: how far a run may be off.
_GIVEN_BAND = (0.8, 1.1)


@dataclass(frozen=True)
class Rate:
    """Bytes per second each way: expected, at the least, at the most; `what` says over what, and how it is known."""

    expected: float
    least: float
    most: float
    what: str


@dataclass(frozen=True)
class Fabric:
    """What joins the ranks of a run: `rate` of the slowest link, `hop_s` inside a machine."""

    num_ranks: int
    num_machines: int
    rate: Rate
    hop_s: float
    remarks: tuple[str, ...]

    def sum_s(self, num_bytes: float, num_calls: int = 1, bytes_per_s: float | None = None) -> float:
        """Seconds to sum so many bytes over all ranks, in so many calls (all-reduce)."""
        return self._ring_s(2, num_bytes, num_calls, bytes_per_s)

    def gather_s(self, num_bytes: float, num_calls: int = 1, bytes_per_s: float | None = None) -> float:
        """Seconds to make so many bytes whole on all ranks, or to sum and cut them (all-gather, reduce-scatter)."""
        return self._ring_s(1, num_bytes, num_calls, bytes_per_s)

    def _ring_s(self, num_rounds: int, num_bytes: float, num_calls: int, bytes_per_s: float | None) -> float:
        if self.num_ranks == 1 or num_calls == 0:
            return 0.0
        abroad = self.num_machines - 1
        hops_s = (self.num_ranks - 1 - abroad) * self.hop_s + abroad * _NETWORK_HOP_S
        sent = num_rounds * (self.num_ranks - 1) / self.num_ranks * num_bytes
        return num_calls * (_START_S + num_rounds * hops_s) + sent / (bytes_per_s or self.rate.expected)


def find_fabric(group: CardGroup, card: Card) -> Fabric:
    """What joins the cards of a group: as given, as the catalogue has it, or as assumed, which its remarks say."""
    per_machine = group.per_machine or CARDS_PER_MACHINE
    num_machines = -(-group.num // per_machine)
    link, hop_s = _link(group, card)
    rates = [link] if num_machines == 1 else [link, _network(group)]
    slowest = min(rates, key=lambda rate: rate.expected)
    bounds = [min(getattr(rate, name) for rate in rates) for name in ("least", "most")]
    remarks = [rate.what for rate in rates]
    if group.per_machine is None:
        where = "one machine" if num_machines == 1 else f"machines of {per_machine}"
        remarks.append(f"all in {where}, assumed (--cards_per_machine)")
    return Fabric(
        group.num, num_machines, Rate(slowest.expected, bounds[0], bounds[1], slowest.what), hop_s, tuple(remarks)
    )


def _link(group: CardGroup, card: Card) -> tuple[Rate, float]:
    given, slot = group.link_bytes_per_s, pcie_bytes_per_s(card)
    if given is not None:
        hop_s = _NVLINK_HOP_S if slot is not None and given > slot else _PCIE_HOP_S
        return _known(given, f"{_told(given)} between cards"), hop_s
    if card.nvlink_bytes_per_s is not None:
        return _known(card.nvlink_bytes_per_s, f"{_told(card.nvlink_bytes_per_s)} over NVLink"), _NVLINK_HOP_S
    if slot is not None:
        low, high = _SLOT_SHARES
        over = f"over PCIe {card.pcie}"
        return _assumed((_SLOT_SHARE * slot, low * slot, high * slot), over, "--link_gb_per_s"), _PCIE_HOP_S
    return _assumed(_UNKNOWN_LINK, "between cards whose slot is not known", "--link_gb_per_s"), _PCIE_HOP_S


def _network(group: CardGroup) -> Rate:
    if (given := group.network_bytes_per_s) is not None:
        return _known(given, f"{_told(given)} between machines")
    return _assumed(_UNKNOWN_NETWORK, "between machines", "--network_gb_per_s")


def _assumed(rates: tuple[float, float, float], where: str, flag: str) -> Rate:
    expected, least, most = rates
    told = f"{_told(expected)} {where}, assumed between {least / 1e9:.3g} and {most / 1e9:.3g} ({flag})"
    return Rate(expected, least, most, told)


def _known(bytes_per_s: float, what: str) -> Rate:
    low, high = _GIVEN_BAND
    return Rate(bytes_per_s, low * bytes_per_s, high * bytes_per_s, what)


def _told(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"
