"""The file of local rows: written, read back, preferred on its machine, and refused when damaged."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import InputError
from onecard.hardware import Gpu, all_cards, card_of, context_bytes, find_card, usable_bytes
from onecard.hardware.card import figures
from onecard.hardware.local_cards import local_cards_file, read_local_cards, write_local_card

GIB = 1024**3


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "a new folder"))
    return tmp_path / "a new folder"


def row(**changes: Any) -> dict[str, Any]:
    """A row as `--measure` writes it."""
    return {
        "name": 'NVIDIA A10G "cloud" it\'s C:\\new 🎉',
        "driver_names": ["NVIDIA A10G"],
        "source": "onecard cards --measure with PyTorch 2.13.0, driver 580.1",
        "date": datetime.date(2026, 11, 22),
        "memory_gib": 22.49,
        "visible_gib": 22.06,
        "measured_context_gib": 0.41,
        "compute_capability": "8.6",
        "num_sms": 80,
        "l2_mib": 6.0,
        "fp32_flops": 1.5e13,
        "flops_16bit": 6.5e13,
        "bandwidth_bytes_per_s": 4.9e11,
        "launch_s": 4.2e-06,
    } | changes


def test_a_written_row_is_found_and_shown_as_local() -> None:
    file = write_local_card("local-a10g", row())
    assert file == local_cards_file()
    card = find_card("local-a10g")
    assert card.is_local
    assert card.name == 'NVIDIA A10G "cloud" it\'s C:\\new 🎉'
    assert card.memory_bytes == round(22.49 * GIB)
    assert (card.flops_16bit, card.launch_s, card.compute_capability) == (6.5e13, 4.2e-06, (8, 6))
    assert card.torch_builds == ("cu126", "cu130", "cu132")
    assert find_card("A10G") == card  # the driver's name works too: the catalogue has no such card
    assert all_cards()[-1] == card
    assert [beside.name for beside in file.parent.iterdir()] == ["cards.toml"]


def test_measured_memory_replaces_the_rules() -> None:
    write_local_card("local-a10g", row())
    card = find_card("local-a10g")
    assert context_bytes(card, "linux-headless") == round(0.41 * GIB)
    assert usable_bytes(card, "linux-headless") == pytest.approx((22.06 - 0.41) * GIB, abs=2)


def test_every_figure_of_a_local_row_has_a_source() -> None:
    write_local_card("local-a10g", row())
    card = find_card("local-a10g")
    assert set(card.sources) == set(figures(card))
    assert card.sources["flops_16bit"].text.startswith("onecard cards --measure")
    assert card.sources["flops_16bit"].date == "2026-11-22"
    assert card.sources["usable_linux_headless_bytes"].text.startswith("onecard cards --measure")
    assert card.sources["torch_builds"].id == "pytorch"


def test_rows_are_kept_and_replaced_by_name() -> None:
    write_local_card("local-a10g", row())
    write_local_card("my card 2", row(driver_names=["NVIDIA B300"]))
    write_local_card("local-a10g", row(num_sms=81))
    assert [(card.key, card.num_sms) for card in read_local_cards()] == [("local-a10g", 81), ("my card 2", 80)]


def test_on_its_machine_a_local_row_comes_first_but_names_stay_those_of_the_catalogue() -> None:
    changes = {"driver_names": ["NVIDIA GeForce RTX 4060 Laptop GPU"], "memory_gib": 7.996, "compute_capability": "8.9"}
    write_local_card("local-rtx-4060-laptop", row(**changes))
    shown = Gpu(0, "NVIDIA GeForce RTX 4060 Laptop GPU", 8188 * 1024**2, 0, (8, 9), "580.1", "GPU-1")
    found = card_of(shown)
    assert found is not None
    assert found.key == "local-rtx-4060-laptop"
    assert find_card("RTX 4060 Laptop").key == "rtx-4060-laptop"


def test_without_a_file_there_are_no_local_rows() -> None:
    assert read_local_cards() == ()


def test_the_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONECARD_HOME")
    assert local_cards_file() == Path("~/.config/onecard/cards.toml").expanduser()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[cards.x\n", "it is no TOML: .*line 1"),
        ("[cards.x]\nname = 'é'\n".encode("latin-1"), "it is no TOML: .*utf-8"),
        pytest.param("x = " + "[" * 100_000, "it is nested too deeply", id="deep"),
        pytest.param("x = " + "1" * 5000, "it is no TOML: .*digits", id="digits"),
        pytest.param("[cards.x]\nmemory_gib = 0x" + "f" * 5000, "it is no TOML: .*digits", id="hexadecimal"),
        ("cards = 3\n", "`cards` must hold tables"),
        ("[card.x]\n", r"\[card\] is unknown: only \[cards.NAME\] is read"),
        ("[cards]\nx = 3\n", "card x: it must be a table"),
        ("[cards.x]\nmemory_gib = -1\n", "card x: memory_gib is -1, but must be a positive number"),
        ("[cards.x]\nmemory_gb = 1\n", "card x: memory_gb is unknown: do you mean memory_gib"),
        ("[cards.x]\nname = 'X'\n", "card x: source is missing"),
        ("[cards.rtx-4090]\n", "card rtx-4090 is in the catalogue: give the row another name"),
        ("[cards.X]\n", "card X: write its name in small letters"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(home: Path, text: str | bytes, problem: str) -> None:
    home.mkdir()
    content = text if isinstance(text, bytes) else text.encode("utf-8")
    (home / "cards.toml").write_bytes(content)
    for use in (all_cards, lambda: write_local_card("local-a10g", row())):
        with pytest.raises(InputError, match=problem) as raised:
            use()
        assert str(home / "cards.toml") in str(raised.value)
        assert "Mend it or delete it" in str(raised.value)
    assert (home / "cards.toml").read_bytes() == content
