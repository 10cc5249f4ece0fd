"""The catalogue: its figures against each other and against what NVIDIA publishes, and finding cards in it."""

import re
from pathlib import Path
from typing import get_args

import pytest

from onecard.errors import InputError
from onecard.hardware import (
    Card,
    CardHost,
    Gpu,
    all_cards,
    card_names,
    card_of,
    context_bytes,
    find_card,
    pcie_bytes_per_s,
    usable_bytes,
    workspace_bytes,
)
from onecard.hardware.card import figures
from onecard.hardware.card_row import find_row_problems
from onecard.hardware.catalogue import shipped_cards

GIB = 1024**3
MIB = 1024**2
TERA = 1e12

# FLOP per clock and SM, dense, summed in fp32, from NVIDIA's architecture papers: GeForce, other cards by capability.
_GEFORCE_TENSOR_RATE = 512
_TENSOR_RATE = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096}
_FP32_RATE = {(6, 1): 256, (7, 0): 128, (7, 5): 128, (8, 0): 128, (8, 6): 256, (8, 9): 256, (9, 0): 256, (12, 0): 256}

cards = pytest.mark.parametrize("card", shipped_cards(), ids=lambda card: card.key)


@pytest.fixture(autouse=True)
def _no_local_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path))


def gpu(name: str, total_mib: int, capability: tuple[int, int]) -> Gpu:
    return Gpu(0, name, total_mib * MIB, total_mib * MIB, capability, "580.1", "GPU-1")


def test_the_catalogue_holds_the_cards_people_have() -> None:
    assert len(shipped_cards()) >= 37
    assert {"rtx-3060-12gb", "rtx-4060-laptop", "rtx-5060", "a6000", "a100-40gb", "h200", "gtx-1080-ti"} <= set(
        card_names()
    )


@cards
def test_every_figure_has_a_source_with_a_date(card: Card) -> None:
    assert set(card.sources) == set(figures(card))
    for source in card.sources.values():
        assert source.text
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", source.date)


@cards
def test_tensor_rates_follow_from_sms_and_clock(card: Card) -> None:
    if card.flops_16bit is None or card.sources["flops_16bit"].id == "data-sheet":
        return
    is_geforce = any("GeForce" in name for name in card.driver_names)
    per_clock = _GEFORCE_TENSOR_RATE if is_geforce else _TENSOR_RATE[card.compute_capability]
    # NVIDIA computes Hopper's rates with a clock of its own (see the source).
    clock = 1.83e9 if card.sources["flops_16bit"].id == "derived-1830" else card.boost_clock_hz
    assert card.flops_16bit == pytest.approx(card.num_sms * clock * per_clock, rel=0.02)
    assert card.tf32_flops == (card.flops_16bit / 2 if card.has_bf16 else None)


@cards
def test_fp32_and_fp8_rates_agree_with_the_others(card: Card) -> None:
    expected = card.num_sms * card.boost_clock_hz * _FP32_RATE[card.compute_capability]
    # TechPowerUp counts 58 of the L4's 60 SMs here, and so does NVIDIA's data sheet (30.3).
    assert card.fp32_flops == pytest.approx(expected, rel=0.04 if card.key == "l4" else 0.02)
    assert (card.fp8_flops is not None) == (card.compute_capability >= (8, 9))
    if card.fp8_flops is not None:
        assert card.fp8_flops == pytest.approx(2 * card.flops_16bit, rel=0.02)


@pytest.mark.parametrize(
    ("name", "tera"),
    # NVIDIA's architecture papers and data sheets: dense, fp32 accumulate.
    [("rtx-5090", 209.5), ("rtx-4090", 165.2), ("rtx-3090-ti", 80), ("a6000", 154.8), ("rtx-6000-ada", 364.2),
     ("a100-80gb-sxm", 312), ("h100-sxm", 989.4), ("t4", 65), ("v100-sxm2-16gb", 125)],
)  # fmt: skip
def test_rates_are_those_that_nvidia_publishes(name: str, tera: float) -> None:
    assert find_card(name).flops_16bit == pytest.approx(tera * TERA, rel=0.01)


def test_pascal_has_no_16_bit_rate_and_turing_no_bf16() -> None:
    assert find_card("gtx-1080-ti").flops_16bit is None
    assert [find_card(name).has_bf16 for name in ("v100-pcie-16gb", "t4", "a100-40gb", "rtx-5060")] == [
        False,
        False,
        True,
        True,
    ]


def test_builds_follow_the_compute_capability() -> None:
    assert find_card("gtx-1080-ti").torch_builds == ("cu126",)
    assert find_card("v100-pcie-16gb").torch_builds == ("cu126",)
    assert find_card("rtx-4060").torch_builds == ("cu126", "cu130", "cu132")  # 8.9 runs the code for 8.6
    assert find_card("rtx-5060").torch_builds == ("cu130", "cu132")  # 12.0 does not run the code for 9.0


def test_a_laptop_has_ranges_and_no_single_power_limit() -> None:
    laptop = find_card("rtx-4060-laptop")
    assert (laptop.tdp_w, laptop.power_limits_w) == (None, (35, 115))
    low, high = laptop.flops_16bit_range
    assert low < laptop.flops_16bit < high
    assert high == pytest.approx(29.1 * TERA, rel=0.01)  # 24 SMs x 2370 MHz x 512
    assert [card.key for card in shipped_cards() if card.power_limits_w] == ["rtx-3060-laptop", "rtx-4060-laptop"]
    assert find_card("rtx-4060").flops_16bit_range is None


@cards
def test_less_memory_is_usable_the_more_a_host_does(card: Card) -> None:
    windows, desktop, headless = (usable_bytes(card, host) for host in ("windows", "linux-desktop", "linux-headless"))
    assert 0.7 * card.memory_bytes < windows < desktop < headless < card.memory_bytes - context_bytes(card, "windows")


def test_usable_memory_of_common_cards() -> None:
    assert usable_bytes(find_card("rtx-5060"), "windows") == pytest.approx(0.81 * 8 * GIB, abs=1)
    # Total less 2 %, the context's 0.45 GiB and the desktop's 0.45 GiB.
    assert usable_bytes(find_card("rtx-5060"), "linux-desktop") == pytest.approx(6.94 * GIB, rel=1e-3)
    # 15 of its 16 GiB are left by error correction.
    assert usable_bytes(find_card("t4"), "linux-headless") == pytest.approx((15 * 0.98 - 0.45) * GIB, rel=1e-3)
    with pytest.raises(ValueError, match="linux-headless"):
        usable_bytes(find_card("t4"), "linux")
    assert usable_bytes(find_card("rtx-5060"), "wsl") == usable_bytes(find_card("rtx-5060"), "windows")
    assert set(get_args(CardHost)) == {"windows", "wsl", "linux-desktop", "linux-headless"}


def test_workspaces_grow_with_hopper() -> None:
    sizes = {name: workspace_bytes(find_card(name)) for name in ("rtx-3060-12gb", "rtx-4090", "h200", "rtx-5060")}
    assert list(sizes.values()) == [8_519_680, 8_519_680, 33_554_432, 33_554_432]


@cards
def test_a_card_is_found_by_all_its_unambiguous_names(card: Card) -> None:
    for name in (card.key, card.key.upper().replace("-", " "), card.name, *card.aliases):
        assert find_card(name) is card


def test_names_as_people_type_them() -> None:
    found = {
        name: find_card(name).key for name in ("4090", "rtx5060", "RTX 3060 12GB", "3060 laptop", "A6000", "Tesla T4")
    }
    assert list(found.values()) == ["rtx-4090", "rtx-5060", "rtx-3060-12gb", "rtx-3060-laptop", "a6000", "t4"]


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("rtx-3060", ["rtx-3060-8gb", "rtx-3060-12gb", "rtx-3060-laptop"]),
        ("NVIDIA GeForce RTX 3080", ["rtx-3080-10gb", "rtx-3080-12gb", "rtx-3080-ti"]),
        ("4060 ti", ["rtx-4060-ti-8gb", "rtx-4060-ti-16gb"]),
        ("A100", ["a100-40gb", "a100-80gb-pcie", "a100-80gb-sxm"]),
        ("v100-sxm2", ["v100-sxm2-16gb", "v100-sxm2-32gb"]),
    ],
)
def test_an_ambiguous_name_lists_its_cards(name: str, candidates: list[str]) -> None:
    with pytest.raises(InputError, match="one of several") as raised:
        find_card(name)
    assert str(raised.value).split(": ", 1)[1] == f"{', '.join(candidates)}. Name the one you mean"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rtx-4900", "rtx-4090"),
        ("H20", "h200"),
        ("A10G", "a10"),
        ("rtx 3070 laptop", "rtx-3060-laptop"),
        ("gtx 4060", "rtx-4060"),
    ],
)
def test_an_unknown_card_is_never_guessed(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"not in the catalogue; near to it: .*{near}.*--measure"):
        find_card(name)


@pytest.mark.parametrize("name", ["", " ", "radeon 7900", "quadro"])
def test_what_resembles_nothing_gets_no_suggestion(name: str) -> None:
    with pytest.raises(InputError, match=r"not in the catalogue\. `onecard cards`"):
        find_card(name)


@pytest.mark.parametrize(
    ("name", "total_mib", "capability", "key"),
    [
        # Names and totals as nvidia-smi shows them.
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8188, (8, 9), "rtx-4060-laptop"),
        ("NVIDIA GeForce RTX 4060", 8188, (8, 9), "rtx-4060"),
        ("NVIDIA GeForce RTX 3060", 12288, (8, 6), "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060", 8192, (8, 6), "rtx-3060-8gb"),
        ("GeForce RTX 3080", 10018, (8, 6), "rtx-3080-10gb"),
        ("NVIDIA GeForce RTX 3080", 12288, (8, 6), "rtx-3080-12gb"),
        ("NVIDIA RTX A6000", 49140, (8, 6), "a6000"),
        ("NVIDIA RTX A6000", 46068, (8, 6), "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", 46068, (8, 9), "rtx-6000-ada"),
        ("NVIDIA A100-SXM4-80GB", 81920, (8, 0), "a100-80gb-sxm"),
        ("NVIDIA A100-PCIE-40GB", 40960, (8, 0), "a100-40gb"),
        ("Tesla V100-SXM2-32GB", 32510, (7, 0), "v100-sxm2-32gb"),
        ("NVIDIA H100 80GB HBM3", 81559, (9, 0), "h100-sxm"),
        ("NVIDIA H200", 143771, (9, 0), "h200"),
        ("Tesla T4", 15360, (7, 5), "t4"),
        ("NVIDIA L4", 23034, (8, 9), "l4"),
        ("NVIDIA GeForce RTX 5060", 8151, (12, 0), "rtx-5060"),
    ],
)
def test_the_driver_s_name_and_memory_lead_to_the_card(
    name: str, total_mib: int, capability: tuple[int, int], key: str
) -> None:
    found = card_of(gpu(name, total_mib, capability))
    assert found is not None
    assert found.key == key


@pytest.mark.parametrize(
    ("name", "total_mib", "capability"),
    [
        ("NVIDIA GeForce RTX 3070 Laptop GPU", 8192, (8, 6)),
        ("NVIDIA A10G", 23028, (8, 6)),
        ("NVIDIA GeForce RTX 3080", 20480, (8, 6)),  # no such card was sold: rebuilt ones exist
        ("NVIDIA A100-SXM4-80GB", 19968, (8, 0)),  # a part of a card (MIG)
        ("NVIDIA RTX A6000", 49140, (8, 9)),
    ],
)
def test_a_card_that_does_not_agree_is_unknown(name: str, total_mib: int, capability: tuple[int, int]) -> None:
    assert card_of(gpu(name, total_mib, capability)) is None


def test_no_two_cards_answer_to_one_driver_s_description() -> None:
    for card in all_cards():
        for name in card.driver_names:
            shown = gpu(name, card.memory_bytes // MIB, card.compute_capability)
            assert card_of(shown) is card


def test_a_damaged_row_is_described_in_full() -> None:
    row = {"name": "X", "memory_gib": "12", "num_sms": 2.5, "boost_clock_range_hz": [2e9, 1e9], "bandwidth": 1}
    text = "\n".join(find_row_problems(row, is_local=False))
    for problem in (
        "memory_gib is '12', but must be a positive number",
        "num_sms is 2.5, but must be a positive whole number",
        "boost_clock_range_hz is [2000000000.0, 1000000000.0], but must be two positive numbers, the smaller one first",
        "bandwidth is unknown: do you mean bandwidth_bytes_per_s?",
        "driver_names is missing",
    ):
        assert problem in text


@cards
def test_every_card_says_which_slot_it_has(card: Card) -> None:
    rate = pcie_bytes_per_s(card)
    assert rate is not None
    # Twice the rate with each generation and with each doubling of lanes, 0.985 GB/s for one lane of 3.0.
    generation, lanes = card.pcie.split(" x")
    assert rate == pytest.approx(0.985e9 * 2 ** (float(generation) - 3) * int(lanes), rel=1e-3)
    # NVLink is told of where it is faster than the slot and there in every machine.
    if card.nvlink_bytes_per_s is not None:
        assert re.search("SXM|H200", card.name)
        assert card.nvlink_bytes_per_s > 2 * rate


@pytest.mark.parametrize("slot", ["6.0 x16", "4.0 x12", "4.0", "x16", 4.0])
def test_a_slot_that_cannot_be_is_refused(slot: object) -> None:
    assert any(problem.startswith("pcie is") for problem in find_row_problems({"pcie": slot}, True))
