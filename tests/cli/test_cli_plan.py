"""`onecard plan` for cards that are not here."""

import json
from pathlib import Path

import pytest

WORDS = [
    *("plan", "--dataset", "text.txt", "--tokenizer", "bytes", "--max_seq_length", "256", "--max_steps", "100"),
    *("--hidden_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "4", "--intermediate_size", "128"),
    *("--total_batch_size", "8", "--optim", "adamw", "--model_config", "{model_type: llama}"),
]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "home"))
    (tmp_path / "text.txt").write_text("some text to train on\n" * 500, encoding="utf-8")


def test_a_plan_for_a_card_tells_memory_and_what_else_there_is(run) -> None:
    done = run(*WORDS, "--card", "rtx-3060-12gb", "--no-refine")
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("device      RTX 3060 12GB (cuda:0), bf16")
    memory = next(line for line in lines if line.startswith("memory"))
    assert "fits: " in memory
    assert " of 10.9 GiB that PyTorch can have" in memory
    assert any(line.strip().startswith("free") and "█" in line for line in lines)
    assert next(line for line in lines if line.strip().startswith("as planned")).rstrip().endswith("fits")
    assert any("gradient_checkpointing true" in line for line in lines)


def test_a_card_that_pytorch_does_not_support_is_planned_with_a_warning(run, monkeypatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    done = run(*WORDS, "--card", "gtx-1080-ti", "--no-refine")
    assert done.code == 0, done.stderr
    place = next(number for number, line in enumerate(done.stdout.splitlines()) if line.startswith("memory"))
    assert "install the cu126 build, --index-url https://download" in done.stdout.splitlines()[place + 1]


def test_a_plan_for_a_card_as_json(run) -> None:
    document = json.loads(run(*WORDS, "--card", "rtx-3060-12gb", "--platform", "windows", "--json").stdout)
    assert document["card"] == "RTX 3060 12GB"
    assert document["fits"] is True
    assert document["limit_bytes"] == int(0.81 * 12 * 2**30)
    assert sum(document["breakdown"].values()) == document["peak_bytes"]
    assert document["settings"]["total_batch_size"] == 8
    assert len(document["alternatives"]) > 4
    assert {
        *("card", "fits", "peak_bytes", "context_bytes", "peak_low_bytes", "peak_high_bytes", "allocated_bytes"),
        *("breakdown", "peak_phase", "host_peak_bytes", "disk_bytes", "step_s", "tokens_per_s", "total_s"),
        *("limited_by", "settings", "choices", "alternatives"),
    } <= document.keys()


def test_no_refine_leaves_it_at_the_eager_step(run) -> None:
    words = [*WORDS, "--card", "rtx-3060-12gb", "--torch_compile", "true", "--no-refine"]
    document = json.loads(run(*words, "--json").stdout)
    assert document["is_refined"] is False
    assert document["settings"]["torch_compile"] is True
    assert "traced without the compiler" in run(*words).stdout


def test_cards_side_by_side(run) -> None:
    done = run(*WORDS, "--card", "rtx-3060-12gb, rtx-4060-laptop")
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["card", "in"],
        ["RTX", "3060"],
        ["RTX", "4060"],
    ]


def test_a_card_side_by_side_that_pytorch_does_not_support_is_named(run, monkeypatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    done = run(*WORDS, "--card", "gtx-1080-ti,rtx-3060-12gb,v100-pcie-16gb")
    table, notes = done.stdout.split("\n\n")
    assert len(table.splitlines()) == 4
    builds = [line for line in notes.splitlines() if "install the cu126 build" in line]
    assert [line.partition(":")[0] for line in builds] == ["GTX 1080 Ti", "V100 PCIe 16GB"]
    document = json.loads(run(*WORDS, "--card", "gtx-1080-ti,rtx-3060-12gb", "--json").stdout)
    assert ["cu126" in (card["note"] or "") for card in document["cards"]] == [True, False]


def test_what_cannot_fit_ends_with_3(run) -> None:
    done = run(*WORDS, "--card", "rtx-3060-12gb", "--memory_limit_gb", "0.001", "--json")
    assert done.code == 3
    assert "weights and optimizer state alone" in done.stderr
    assert json.loads(done.stdout)["fits"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--card", "rtx-9999"], "rtx-9999"),
        (["--card", "rtx-3060"], "rtx-3060-12gb"),
        (["--card", "rtx-3060-12gb", "--platform", "dos"], "platform 'dos' is unknown"),
        (["--platform", "windows"], "--platform belongs to --card"),
    ],
)
def test_what_cannot_be_planned_is_explained(run, words: list[str], message: str) -> None:
    done = run(*WORDS, *words)
    assert done.code == 2
    assert message in done.stderr


def test_a_missing_text_is_no_obstacle(run) -> None:
    done = run(*WORDS[:2], "not/here.txt", *WORDS[3:], "--card", "rtx-3060-12gb", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["corpus"]["num_train_tokens"] == 0


def test_outcomes_are_shared_as_json(run, tmp_path: Path) -> None:
    done = run("cards", "--contribute")
    assert done.code == 2
    assert "no run on a known card has been finished here yet" in done.stderr
    row = {
        "card": "rtx-4090",
        "platform": "linux",
        "torch": "2.13.0",
        "driver": None,
        "date": "2026-11-22",
        "settings": {},
        "predicted_peak_bytes": 10,
        "measured_peak_bytes": 11,
        "predicted_step_s": 1.0,
        "measured_step_s": 1.5,
        "seconds": {},
    }
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "outcomes.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert json.loads(run("cards", "--contribute").stdout) == row
    assert run("cards", "rtx-3090", "--contribute").code == 2
