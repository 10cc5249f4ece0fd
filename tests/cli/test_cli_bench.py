"""`onecard bench`: what it says, what it refuses, and the worker behind it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onecard.api
from onecard.api.bench_worker import work
from onecard.cli.bench_text import bench_document, bench_lines, speed_bars, table_rows
from onecard.report.bench_page import draw_bars
from onecard.spec import Plan
from onecard.trials.bench import Bench
from onecard.trials.measured import Row, summarize

TINY: dict[str, Any] = {
    "tokenizer": "char",
    "max_seq_length": 16,
    "model_config": {"model_type": "llama", "intermediate_size": 48},
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_steps": 240,
    "total_batch_size": 4,
    "optim": "adamw",
    "device": "cpu",
    "precision": "fp32",
    "torch_compile": False,
}


def timing(*speeds: float, peak_flops: float = 1e9) -> dict[str, Any]:
    return {
        "first_step_s": 1.5,
        "steps": [(0.5, round(speed / 2), 0.0) for speed in speeds],
        "peak_bytes": 2**30,
        "peak_flops": peak_flops,
        "peak_precision": "fp32",
        "is_compiled": False,
    }


@pytest.fixture
def found(tiny_plan: Callable[..., Plan]) -> Bench:
    rows = (
        summarize({"seed": "1"}, tiny_plan(), [timing(900, 1000), timing(2000, 2200)], False),
        summarize({"seed": "2"}, tiny_plan(micro_batch_size=2), [timing(100, 100)], True),
        Row({"seed": "<3>"}, problem="memory ran out: <b>no</b> room"),
    )
    return Bench("recipes/my own.yaml", (Row(**{**vars(rows[0]), "is_best": True}), *rows[1:]), 2, 3, 60.0, False)


def test_a_table_says_speed_spread_and_reason(found: Bench) -> None:
    header, best, other, failed = table_rows(found)
    assert best[:3] == ("*", "seed=1", "1,500")
    assert best[header.index("of peak")] == "15.0%"
    assert "rounds 950, 2,100" in best[-1]
    assert "batch 8 = 4 x 2; eager; random tokens" in other[-1]
    assert failed[-1] == "memory ran out: <b>no</b> room"
    text = "\n".join(bench_lines(found))
    assert "Fastest: seed=1" in text
    assert "2 of 3 rounds" in text
    assert "6 N + 6 layers x width x length = 100" in text
    assert "random tokens stood in" in text


def test_bars_are_as_long_as_speeds_and_texts_are_escaped(found: Bench) -> None:
    svg = draw_bars(speed_bars(found), 860)
    widths = [float(part.split('"')[0]) for part in svg.split('width="')[1:]]
    assert widths[0] / widths[1] == pytest.approx(15, rel=0.01)
    assert "&lt;b&gt;no&lt;/b&gt;" in svg
    assert "<b>" not in svg


def test_the_document_holds_every_row(found: Bench) -> None:
    document = bench_document(found, Path("a.html"))
    assert [row["setting"]["seed"] for row in document["rows"]] == ["1", "2", "<3>"]
    assert document["best"] == {"seed": "1"}
    assert document["rows"][0]["tokens_per_s"]["median"] == 1500
    assert document["rows"][2]["tokens_per_s"] is None
    json.dumps(document, allow_nan=False)


def test_it_writes_a_page_that_stands_alone_and_overwrites_none(
    run: Callable[..., Any], found: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(onecard.api, "bench", lambda *args, **words: (asked.append((args, words)), found)[1])
    monkeypatch.chdir(tmp_path)
    done = run("bench", "demo", "--sweep", "batch-size=4,8", "--sweep=seed=1,2", "--optim", "adamw", "--json")
    assert done.code == 0, done.stderr
    (source,), words = asked[0]
    assert source == "demo"
    assert words["sweep"] == {"per_device_train_batch_size": ["4", "8"], "seed": ["1", "2"]}
    assert words["optim"] == "adamw"
    page = Path(json.loads(done.stdout)["page"])
    assert page.name.startswith("bench-my-own-")
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert "&lt;b&gt;" in text
    again = run("bench", "--page", str(page))
    assert again.code == 2
    assert "exists" in again.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sweep", "batch_size"], "is no key=value,value"),
        (["--sweep", "learnin_rate=1,2"], "learning_rate"),
        (["--sweep", "optim=adamw,sgd"], "sgd"),
        (["--seed", "1", "--sweep", "seed=1,2"], "given as a flag and in a --sweep"),
        (["--minutes", "0"], "give a number above 0"),
        (["no-such-recipe"], "no-such-recipe"),
    ],
)
def test_bad_input_ends_it_at_once(run: Callable[..., Any], words: list[str], told: str) -> None:
    done = run("bench", *words)
    assert done.code == 2
    assert told in done.stderr


@pytest.fixture
def job(tmp_path: Path, corpus_text: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("onecard.planner.measure._PEAK_SIZE", {"cpu": 64})
    settings = [TINY | {"dataset": str(corpus_text)}]
    return {"source": None, "settings": settings, "may_be_synthetic": True, "plan": None, "seconds": 0.1}


def test_a_worker_prepares_text_and_times_it_by_the_plan_it_is_given(job: dict[str, Any]) -> None:
    assert list(work(job | {"does": "check"})) == [{"is_synthetic": False}]
    (first,) = work(job | {"does": "time", "is_synthetic": False})
    assert len(first["timing"]["steps"]) >= 3
    plan = first["plan"] | {"micro_batch_size": 1}
    (second,) = work(job | {"does": "time", "is_synthetic": False, "plan": plan})
    assert second["plan"] == plan


def test_random_tokens_stand_in_for_text_that_a_recipe_names_and_nobody_has(job: dict[str, Any]) -> None:
    absent = {"settings": [TINY | {"dataset": "no/such/file.txt"}, TINY]}
    assert list(work(job | absent | {"does": "check"})) == [{"is_synthetic": True}] * 2
    (timed,) = work(job | {"settings": [TINY], "does": "time", "is_synthetic": True})
    assert timed["plan"]["corpus"]["fingerprint"] == "synthetic"
    assert len(timed["timing"]["steps"]) >= 3


def test_text_that_a_person_names_has_to_be_there(job: dict[str, Any]) -> None:
    absent = {"settings": [TINY | {"dataset": "no/such/file.txt"}], "may_be_synthetic": False}
    (answer,) = work(job | absent | {"does": "check"})
    assert "no/such/file.txt" in answer["error"]


def test_every_setting_gets_its_own_answer(job: dict[str, Any]) -> None:
    settings = [job["settings"][0] | {"precision": precision} for precision in ("fp16", "fp32")]
    refused, fine = work(job | {"settings": settings, "does": "check"})
    assert "fp16" in refused["error"]
    assert fine == {"is_synthetic": False}
