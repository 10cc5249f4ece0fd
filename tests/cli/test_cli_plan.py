"""`onecard plan` for cards that are not here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli.conftest import SMALL_PLAN

from onecard import api
from onecard.run.folder import RunFolder
from onecard.spec import load_recipe

pytestmark = pytest.mark.usefixtures("small_text")


def test_a_plan_for_a_card_tells_memory_and_what_else_there_is(run) -> None:
    done = run(*SMALL_PLAN, "--card", "rtx-3060-12gb", "--no-refine")
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
    done = run(*SMALL_PLAN, "--card", "gtx-1080-ti", "--no-refine")
    assert done.code == 0, done.stderr
    place = next(number for number, line in enumerate(done.stdout.splitlines()) if line.startswith("memory"))
    assert "install the cu126 build, --index-url https://download" in done.stdout.splitlines()[place + 1]


def test_a_plan_for_a_card_as_json(run) -> None:
    document = json.loads(run(*SMALL_PLAN, "--card", "rtx-3060-12gb", "--platform", "windows", "--json").stdout)
    assert document["card"] == "RTX 3060 12GB"
    assert document["fits"] is True
    assert document["limit_bytes"] == int(0.81 * 12 * 2**30)
    assert sum(document["breakdown"].values()) == document["peak_bytes"] + document["context_bytes"]
    assert document["settings"]["total_batch_size"] == 8
    assert len(document["alternatives"]) > 4
    assert {
        *("card", "fits", "peak_bytes", "context_bytes", "peak_low_bytes", "peak_high_bytes", "allocated_bytes"),
        *("breakdown", "peak_phase", "host_peak_bytes", "disk_bytes", "step_s", "tokens_per_s", "total_s"),
        *("limited_by", "settings", "choices", "alternatives"),
    } <= document.keys()


def test_no_refine_leaves_it_at_the_eager_step(run) -> None:
    words = [*SMALL_PLAN, "--card", "rtx-3060-12gb", "--torch_compile", "true", "--no-refine"]
    document = json.loads(run(*words, "--json").stdout)
    assert document["is_refined"] is False
    assert document["settings"]["torch_compile"] is True
    assert "traced without the compiler" in run(*words).stdout


def test_cards_side_by_side(run) -> None:
    done = run(*SMALL_PLAN, "--card", "rtx-3060-12gb, rtx-4060-laptop")
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["card", "in"],
        ["RTX", "3060"],
        ["RTX", "4060"],
    ]


def test_a_card_side_by_side_that_pytorch_does_not_support_is_named(run, monkeypatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    done = run(*SMALL_PLAN, "--card", "gtx-1080-ti,rtx-3060-12gb,v100-pcie-16gb")
    table, notes = done.stdout.split("\n\n")
    assert len(table.splitlines()) == 4
    builds = [line for line in notes.splitlines() if "install the cu126 build" in line]
    assert [line.partition(":")[0] for line in builds] == ["GTX 1080 Ti", "V100 PCIe 16GB"]
    document = json.loads(run(*SMALL_PLAN, "--card", "gtx-1080-ti,rtx-3060-12gb", "--json").stdout)
    assert all(len(card["alternatives"]) > 4 for card in document["cards"])
    assert ["cu126" in (card["note"] or "") for card in document["cards"]] == [True, False]


def test_what_cannot_fit_ends_with_3(run) -> None:
    done = run(*SMALL_PLAN, "--card", "rtx-3060-12gb", "--memory_limit_gb", "0.001", "--json")
    assert done.code == 3
    assert "weights, gradients and optimizer state alone" in done.stderr
    assert json.loads(done.stdout)["fits"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--card", "rtx-9999"], "rtx-9999"),
        (["--card", "rtx-3060"], "rtx-3060-12gb"),
        (["--card", "rtx-3060-12gb", "--platform", "dos"], "platform 'dos' is unknown"),
        (["--platform", "windows"], "--platform belongs to --card"),
        (["--card", ""], "--card '' names no card"),
        (["--card", " , "], "--card ' , ' names no card"),
        (["--card", "rtx-3060-12gb", "--device", "cpu"], "a plan for RTX 3060 12GB cannot be one for device cpu"),
        (["--explain", "runs/a"], "would change nothing: --dataset text.txt"),
    ],
)
def test_what_cannot_be_planned_is_explained(run, words: list[str], message: str) -> None:
    done = run(*SMALL_PLAN, *words)
    assert done.code == 2
    assert message in done.stderr


@pytest.mark.parametrize("option", [["--card", "zzz"], ["--config", "x.yaml"], ["--platform", "linux"]])
def test_an_explained_plan_takes_nothing_else(run, option: list[str]) -> None:
    done = run("plan", "--explain", "runs/a", *option)
    assert done.code == 2
    assert f"would change nothing: {' '.join(option)}" in done.stderr


def test_an_unknown_card_is_refused_before_anything_heavy_is_loaded() -> None:
    code = (
        "import sys\n"
        "from onecard.cli import main\n"
        "try: main(['plan', 'demo', '--card', 'rtx-3060-12gb,rtx-9999'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert "card 'rtx-9999' is not in the catalogue" in done.stderr
    assert done.stdout.strip() == "False"


def test_a_limit_beyond_the_card_is_told(run) -> None:
    words = [*SMALL_PLAN, "--card", "rtx-3060-12gb", "--no-refine"]
    told = "memory_limit_gb 100 changes nothing: it is more than can be had"
    done = run(*words, "--memory_limit_gb", "100")
    place = next(number for number, line in enumerate(done.stdout.splitlines()) if line.startswith("memory  "))
    assert done.stdout.splitlines()[place + 1].strip().endswith(told)
    assert (
        json.loads(run(*words, "--memory_limit_gb", "100GiB", "--json").stdout)["choices"]["memory_limit_bytes"] == told
    )
    assert "changes nothing" not in run(*words, "--memory_limit_gb", "3.2GB").stdout


def test_the_whole_run_is_its_steps_evaluations_and_checkpoints(run) -> None:
    told = json.loads(run(*SMALL_PLAN, "--card", "rtx-3060-12gb", "--no-refine", "--json").stdout)
    parts = [(100, told["step_s"]), *((told[f"num_{what}s"], told[f"{what}_s"]) for what in ("evaluation", "save"))]
    assert all(count > 0 and seconds > 0 for count, seconds in parts)
    assert sum(count * seconds for count, seconds in parts) == pytest.approx(told["total_s"])


def test_a_saved_plan_is_explained_with_its_alternatives(run, tmp_path: Path) -> None:
    recipe = load_recipe(None, **dict(zip((word[2:] for word in SMALL_PLAN[1::2]), SMALL_PLAN[2::2], strict=True)))
    made = api.plan(recipe, card="rtx-3060-12gb", refine=False)
    RunFolder.create(tmp_path / "run", recipe, made)
    done = run("plan", "--explain", str(tmp_path / "run"))
    assert done.code == 0, done.stderr
    ladder = done.stdout[done.stdout.index("what else there is") :].splitlines()
    assert ladder[1].split()[:2] == ["as", "planned"]
    document = json.loads(run("plan", "--explain", str(tmp_path / "run"), "--json").stdout)
    assert len(document["alternatives"]) == len(ladder) - 1 > 4
    away = made.forecast.model_copy(update={"card": "a card of nobody"})
    RunFolder.create(tmp_path / "other", recipe, made.model_copy(update={"forecast": away}))
    done = run("plan", "--explain", str(tmp_path / "other"))
    assert done.code == 0
    assert "alternatives cannot be forecast here: card 'a card of nobody' is not in the catalogue" in done.stdout


def test_a_missing_text_is_no_obstacle(run) -> None:
    done = run(*SMALL_PLAN[:2], "not/here.txt", *SMALL_PLAN[3:], "--card", "rtx-3060-12gb", "--json")
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
