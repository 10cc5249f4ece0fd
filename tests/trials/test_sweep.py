"""Which settings are tried, and in which processes."""

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import InputError
from onecard.trials import bench as benches
from onecard.trials.bench import Bench, Workers, bench
from onecard.trials.measured import Spread
from onecard.trials.sweep import check_settings, list_settings, parse_sweeps


def test_sweeps_make_their_product_in_order() -> None:
    sweeps = parse_sweeps(["batch-size=4, 8", "torch_compile=true,false"])
    assert list(sweeps) == ["per_device_train_batch_size", "torch_compile"]
    assert [tuple(setting.values()) for setting in list_settings(sweeps)] == [
        ("4", "true"),
        ("4", "false"),
        ("8", "true"),
        ("8", "false"),
    ]
    assert list_settings({}) == [{}]


def test_all_that_cannot_be_read_is_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        parse_sweeps(["seed", "seed=1,2", "seed=3", "max_steps=5,5", "name=a,b", "optim=,"])
    assert len(str(caught.value).splitlines()) == 5
    with pytest.raises(InputError, match="9 x 9 = 81 settings"):
        list_settings({"seed": range(9), "max_steps": range(9)})


def test_settings_that_a_recipe_refuses_are_told_together_before_anything_runs() -> None:
    settings = list_settings(parse_sweeps(["per_device_train_batch_size=8,none,x"]))
    with pytest.raises(InputError, match="2 problems"):
        check_settings("demo", {}, settings)
    with pytest.raises(InputError, match="given as a flag and in a --sweep"):
        check_settings("demo", {"seed": "1"}, [{"seed": "2"}])


def test_a_spread_is_of_the_middle_half() -> None:
    assert Spread.of([1, 2, 3, 4, 100]) == Spread(3, 2, 4, 1, 100)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7, 7)


WORKER = """
    import json, os, sys, time
    from pathlib import Path
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    log = Path(sys.argv[0]).with_suffix(".log")
    for setting in job["settings"]:
        with log.open("a") as file:
            print(job["does"], setting["seed"], job.get("plan") is not None, file=file)
        speed = {"1": 100.0, "2": 200.0, "3": 199.0, "4": 50.0}[setting["seed"]]
        if job["does"] == "check":
            answer = {"error": "no such text"} if setting.get("optim") == "adamw" else {"is_synthetic": False}
        elif setting["seed"] == "4":
            sys.exit("the driver says no")
        else:
            count = len(log.read_text().splitlines())
            steps = [[1.0, speed + count, 0.1]] * 3
            answer = {"plan": json.loads(os.environ["PLAN"]), "timing": {
                "first_step_s": 2.0, "warmup_s": 3.0, "steps": steps, "peak_bytes": 1000, "peak_flops": 1e9,
                "peak_precision": "fp32", "is_compiled": False,
                "shortage": "no room" if setting["seed"] == "1" else None}}
        print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_plan: Any) -> Path:
    monkeypatch.setenv("PLAN", tiny_plan().model_dump_json())
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(WORKER), encoding="utf-8")
    return path


def run(worker: Path, seeds: str, minutes: float = 1.0, **overrides: Any) -> Bench:
    workers = Workers("demo", overrides, (sys.executable, str(worker)))
    return bench(workers, list_settings({"seed": list(seeds)}), minutes, lambda text: None)


def test_rounds_go_back_and_forth_and_what_dies_or_has_no_room_is_a_row(worker: Path) -> None:
    found = run(worker, "1234")
    rows = {row.setting["seed"]: row for row in found.rows}
    assert "no room" in str(rows["1"].problem)
    assert "exit code 1" in str(rows["4"].problem)
    assert "the driver says no" in str(rows["4"].problem)
    assert rows["2"].is_best
    assert rows["3"].is_near_best  # its rounds reach into those of the best
    assert [len(rows[seed].rounds) for seed in "1234"] == [0, 3, 3, 0]
    timed = [line.split()[1:] for line in worker.with_suffix(".log").read_text().splitlines() if "time" in line]
    assert [seed for seed, _ in timed] == [*"1234", *"32", *"23"]
    assert [has_plan for _, has_plan in timed] == [*["False"] * 4, *["True"] * 4]  # planned once


def test_the_share_of_peak_and_of_waiting_are_of_what_was_measured(worker: Path, tiny_plan: Any) -> None:
    row = run(worker, "2").rows[0]
    assert row.tokens_per_s is not None
    assert row.share_of_peak == pytest.approx(row.tokens_per_s.median * tiny_plan().flops_per_token / 1e9)
    assert row.wait_share == pytest.approx(0.1)


def test_nothing_begins_when_the_time_is_over(worker: Path) -> None:
    found = run(worker, "23", minutes=1e-9)
    assert found.num_rounds == 0
    assert all("not reached" in str(row.problem) for row in found.rows)
    assert found.best is None


def test_a_setting_that_cannot_be_honoured_ends_it_before_anything_is_timed(worker: Path) -> None:
    with pytest.raises(InputError, match="no such text"):
        run(worker, "23", optim="adamw")
    assert "time" not in worker.with_suffix(".log").read_text()


def test_what_hangs_is_ended(worker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "_GRACE_S", 0.5)
    text = "import sys, time; print('{}') if '\"check\"' in open(sys.argv[1]).read() else time.sleep(60)"
    worker.write_text(text, encoding="utf-8")
    found = run(worker, "2", minutes=0.02)
    assert "no answer after" in str(found.rows[0].problem)
