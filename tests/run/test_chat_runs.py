"""A run over conversations keeps the promises of a run over text."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from onecard.data import ChatCorpus, ChatRequest, Source, prepare_chats
from onecard.data.tokenizer import train_tokenizer
from onecard.errors import InputError
from onecard.hardware import probe_machine
from onecard.planner import facts_of, make_plan
from onecard.run.folder import RunFolder
from onecard.run.inputs import fetch_base
from onecard.run.session import run_session
from onecard.spec import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from run.conftest import Outcome, Runner

    from onecard.observe.events import Event


@pytest.fixture
def chats(tmp_path: Path) -> ChatCorpus:
    train_tokenizer("bytes", ()).save_pretrained(tmp_path / "tokenizer")
    with (tmp_path / "chats.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(60):
            stream.write(json.dumps({"prompt": f"What is {number}?", "response": "x" * (1 + number % 5)}) + "\n")
    return prepare_chats(
        ChatRequest(
            (Source(str(tmp_path / "chats.jsonl")),),
            str(tmp_path / "tokenizer"),
            eval_fraction=0.2,
            max_seq_length=64,
            cache_dir=tmp_path / "cache",
        )
    )


def start(runner: "Runner", chats: ChatCorpus, name: str, on_event: "Callable[[Event], None] | None") -> "Outcome":
    recipe = runner.recipe(max_seq_length=64)
    folder = RunFolder.create(runner.folder / name, recipe, make_plan(recipe, probe_machine(), facts_of(chats)))
    with folder.lock():
        run_session(folder, chats, None, on_event)
    return runner.outcome(name)


def test_stopped_and_resumed_over_chats(
    chats: ChatCorpus, runner: "Runner", stop_at: "Callable[[int], Callable[[Event], None]]"
) -> None:
    whole = start(runner, chats, "whole", None)
    start(runner, chats, "stopped", stop_at(7))
    folder = RunFolder(runner.folder / "stopped")
    with folder.lock():
        run_session(folder, chats, folder.find_resumable(), None)
    runner.outcome("stopped").assert_equals(whole)
    evaluated = [event for event in whole.record if event["event"] == "evaluated"]
    assert [event["step"] for event in evaluated] == [4, 8, 12]
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]


def test_bits_per_byte_are_those_of_the_targets(chats: ChatCorpus, runner: "Runner") -> None:
    import math

    whole = start(runner, chats, "whole", None)
    last = [event for event in whole.record if event["event"] == "evaluated"][-1]
    per_byte = chats.num_heldout_target_tokens / chats.heldout_bytes
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2) * per_byte)
    steps = [event for event in whole.record if event["event"] == "step"]
    assert all(event["num_target_tokens"] < 8 * 30 for event in steps)


def test_missing_operators_are_told_before_a_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = load_recipe({"dataset": "chats.jsonl", "model_name_or_path": "no/where", "method": "qlora"})
    with pytest.raises(InputError, match="qlora needs bitsandbytes"):
        fetch_base(recipe, weights=True)
