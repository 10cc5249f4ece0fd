"""A forecast as bars, rows and a document."""

import json
import re
import sys

import pytest

from onecard.cli.forecast_text import bar_lines, forecast_rows, plan_document
from onecard.spec import Forecast, Plan

MIB = 2**20


def sizes(lines: list[str]) -> float:
    """MiB that the bars are told to be, but for what is free."""
    found = [re.search(r"([\d.]+) MiB$", line) for line in lines if not line.strip().startswith("free")]
    return sum(float(match[1]) for match in found if match)


def test_bars_add_up_to_the_peak_however_large_the_card_is(plan: Plan, forecast: Forecast) -> None:
    made = plan.model_copy(update={"forecast": forecast})
    lines = bar_lines(made)
    assert [line.split()[0] for line in lines] == ["activations", "weights", "other", "free"]
    assert sizes(lines) == 100.0
    assert all("█" in line for line in lines)
    crumbs = forecast.memory.model_copy(update={"breakdown": {"weights": 100 * MIB - 8, "batch": 8}})
    lines = bar_lines(plan.model_copy(update={"forecast": forecast.model_copy(update={"memory": crumbs})}))
    assert [line.split()[0] for line in lines] == ["weights", "free"]


@pytest.mark.parametrize("columns", [60, 70, 80, 200, None])
def test_bars_fit_the_terminal(plan: Plan, forecast: Forecast, columns: int | None) -> None:
    memory = forecast.memory.model_copy(update={"breakdown": {"allocator slack": 100 * MIB}})
    made = plan.model_copy(update={"forecast": forecast.model_copy(update={"memory": memory})})
    lines = bar_lines(made, columns)
    assert {len(line) for line in lines} == {min(columns or 200, 78)}


def test_caveats_are_in_the_document_and_beside_the_memory(plan: Plan, forecast: Forecast) -> None:
    idle = "memory_limit_gb 100 changes nothing"
    made = plan.model_copy(update={"forecast": forecast, "reasons": {"memory_limit_bytes": idle}})
    assert json.loads(json.dumps(plan_document(made)))["note"] == "a remark"
    rows = forecast_rows(made)
    assert rows[1:3] == [("", "a remark"), ("", idle)]
    slow = forecast.time.model_copy(update={"note": "of time"})
    noted = plan_document(plan.model_copy(update={"forecast": forecast.model_copy(update={"time": slow})}))
    assert (noted["time_note"], plan_document(made)["time_note"]) == ("of time", None)
    silent = forecast.model_copy(update={"memory": forecast.memory.model_copy(update={"note": None})})
    assert plan_document(plan.model_copy(update={"forecast": silent}))["note"] is None


def test_times_beside_the_steps_are_told(plan: Plan, forecast: Forecast) -> None:
    made = plan.model_copy(update={"forecast": forecast})
    assert dict(forecast_rows(made))["of it"] == "2 evaluations of 2.5 s, 1 checkpoint of 1 s"
    sampling = made.model_copy(update={"sample_prompts": ("a",)})
    assert dict(forecast_rows(sampling))["of it"].endswith("samples come on top")
    older = forecast.time.model_copy(update={"evaluation_s": None, "num_evaluations": None, "num_saves": None})
    assert "of it" not in dict(
        forecast_rows(plan.model_copy(update={"forecast": forecast.model_copy(update={"time": older})}))
    )


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_plan_folds_to_the_terminal(run, api, plan: Plan, forecast: Forecast, monkeypatch, columns: int) -> None:
    api.plan_made = plan.model_copy(update={"device": "cpu", "forecast": forecast})
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = run("plan", "--dataset", "a.txt").stdout.splitlines()
    assert any("█" in line for line in lines)
    assert any("micro_batch_size" in line for line in lines)
    assert max(map(len, lines)) <= columns
