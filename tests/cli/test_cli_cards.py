"""`onecard cards`: the table, one card, JSON, and measuring where there is nothing to measure."""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onecard.hardware import probe_machine
from onecard.hardware.catalogue import shipped_cards

ROW = {
    "name": "NVIDIA A10G",
    "driver_names": ["NVIDIA A10G"],
    "source": "onecard cards --measure",
    "date": datetime.date(2026, 11, 22),
    "memory_gib": 22.49,
    "compute_capability": "8.6",
    "num_sms": 80,
    "l2_mib": 6.0,
    "fp32_flops": 1.5e13,
    "flops_16bit": 6.5e13,
    "bandwidth_bytes_per_s": 4.9e11,
    "launch_s": 4.2e-06,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path))
    return tmp_path


def test_the_table_has_every_card_and_fits_100_columns(run) -> None:
    done = run("cards")
    assert (done.code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    keys = [line.split()[0] for line in lines[1 : lines.index("")]]
    assert keys == [card.key for card in shipped_cards()]
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("rtx-4060-laptop"))
    assert " ".join(row.split()) == "rtx-4060-laptop 8 7.4 6.9 6.5 256 18.0-29.1 11.6 yes cu126/130/132"
    assert " ".join(lines[0].split()) == "card GiB headless desktop Windows GB/s 16-bit fp32 bf16 PyTorch"


def test_one_card_shows_every_figure_with_its_source(run) -> None:
    lines = run("cards", "4060 laptop").stdout.splitlines()
    start = lines.index("")
    figures = lines[start + 1 : lines.index("", start + 1)]
    assert all(line.endswith("]") for line in figures)
    numbers = {line.rsplit("[", 1)[1] for line in figures}
    cited = {line.split()[0][1:] for line in lines if line.startswith("[")}
    assert numbers == cited
    text = "\n".join(figures)
    for shown in ("6.48 GiB", "35-115 W", "1470-2370 MHz", "18.0-29.1 TFLOP/s", "cu126 cu130 cu132", "8.12 MiB"):
        assert shown in text


@pytest.mark.parametrize("card", shipped_cards(), ids=lambda card: card.key)
def test_every_card_can_be_shown(run, card: Any) -> None:
    assert run("cards", card.key).stdout.startswith(f"{card.key}: {card.name}\n")


def test_json_is_one_document_with_sources(run) -> None:
    document = json.loads(run("cards", "--json").stdout)
    assert list(document["cards"]) == [card.key for card in shipped_cards()]
    for card in document["cards"].values():
        assert all(figure["source"] in document["sources"] for figure in card["figures"].values())
    laptop = document["cards"]["rtx-4060-laptop"]["figures"]
    assert laptop["power_limits_w"]["value"] == [35, 115]
    assert laptop["compute_capability"]["value"] == "8.9"
    assert laptop["torch_builds"]["value"] == ["cu126", "cu130", "cu132"]
    assert list(json.loads(run("cards", "t4", "--json").stdout)["cards"]) == ["t4"]


def test_unknown_and_ambiguous_names_are_errors(run) -> None:
    done = run("cards", "rtx-4900")
    assert (done.code, done.stdout) == (2, "")
    assert "near to it: " in done.stderr
    done = run("cards", "rtx-3060")
    assert done.code == 2
    assert "rtx-3060-8gb, rtx-3060-12gb, rtx-3060-laptop" in done.stderr


def test_a_damaged_local_file_is_an_error_with_its_name(run, home: Path) -> None:
    (home / "cards.toml").write_text("[cards.x]\nmemory_gib = 'much'\n", encoding="utf-8")
    for words in (("cards",), ("cards", "--json"), ("cards", "t4"), ("cards", "--measure")):
        done = run(*words)
        assert (done.code, done.stdout) == (2, "")
        assert str(home / "cards.toml") in done.stderr
        assert "memory_gib is 'much'" in done.stderr


@pytest.mark.skipif(bool(probe_machine().gpus), reason="a card is here")
def test_measuring_without_a_card_says_so(run, home: Path) -> None:
    done = run("cards", "--measure")
    assert (done.code, done.stdout) == (2, "")
    assert "there is no card to measure" in done.stderr
    assert list(home.iterdir()) == []


def test_measuring_takes_no_name(run) -> None:
    done = run("cards", "t4", "--measure")
    assert done.code == 2
    assert "takes no name" in done.stderr


def test_what_was_measured_is_kept_and_shown_as_local(run, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    from onecard.diagnose import measure_card

    def measure(machine: Any, progress: Any) -> tuple[str, dict[str, Any]]:
        progress("memory")
        return "local-a10g", ROW

    monkeypatch.setattr(measure_card, "measure_present_card", measure)
    done = run("cards", "--measure", "--json")
    assert json.loads(done.stdout)["cards"]["local-a10g"]["is_local"] is True
    assert done.stderr == f"timing memory\nwritten to {home / 'cards.toml'}\n"
    shown = run("cards", "local-a10g").stdout
    assert shown.startswith("local-a10g: NVIDIA A10G (a local row)")
    assert "4.2 µs" in shown
    assert run("cards").stdout.splitlines()[len(shipped_cards()) + 1].startswith("local-a10g ")


def test_the_catalogue_is_shown_without_torch() -> None:
    code = (
        "import sys\n"
        "from onecard.cli import main\n"
        "try: main(['cards'])\n"
        "finally: print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.stderr.strip() == "[]"
    assert "rtx-5060" in done.stdout
