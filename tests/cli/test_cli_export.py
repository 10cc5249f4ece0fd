"""`onecard export` says what was written and how near it is."""

import json
from collections.abc import Callable
from typing import Any

import pytest

import onecard.api
from onecard.spec.handover import Export, Fidelity

WRITTEN = Export(
    format="gguf",
    dtype="q8_0",
    folder="runs/a/exports/step-000008-gguf-q8_0",
    checkpoint="step-000008",
    num_bytes=2048,
    files=("Modelfile", "a-q8_0.gguf"),
    fidelity=Fidelity(largest_difference=0.5, logit_range=50.0, same_top_share=0.984, num_tokens=128),
    notes=("merged into my/base",),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def export(model: str, to: str, **settings: Any) -> Export:
        found.append({"model": model, "to": to} | settings)
        return WRITTEN

    monkeypatch.setattr(onecard.api, "export", export)
    return found


def test_words_reach_the_function(run: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    outcome = run("export", "runs/a", "--to", "gguf", "--checkpoint", "8", "--dtype", "q8_0")
    assert outcome.code == 0
    assert calls == [{"model": "runs/a", "to": "gguf", "dtype": "q8_0", "checkpoint": "8", "output": None}]
    assert "logits off by 0.5 at most (1.000% of their range)" in outcome.stdout
    assert "98.4% of 128 places" in outcome.stdout
    assert "merged into my/base" in outcome.stdout


def test_json_is_one_document(run: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    assert Export.model_validate(json.loads(run("export", "runs/a", "--to", "gguf", "--json").stdout)) == WRITTEN


def test_mistakes_are_told_together(run: Callable[..., Any]) -> None:
    outcome = run("export", "runs/a", "--to", "onnx", "--dtype", "int4")
    assert outcome.code == 2
    assert "'onnx'" in outcome.stderr
    assert "'int4'" in outcome.stderr
    assert "Traceback" not in outcome.stderr
