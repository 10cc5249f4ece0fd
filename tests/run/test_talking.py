"""A run of adapters answers the same whichever verb asks it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import onecard

if TYPE_CHECKING:
    from conftest import Runner

QUESTION = "What did they bake?"


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_chat_says_what_generate_says(method: str, tuner: Callable[..., "Runner"]) -> None:
    run = tuner("llama", method=method, max_steps=4, eval_steps=2, save_steps=2).start("run")
    (text,) = onecard.generate(run.root, [QUESTION], max_new_tokens=8, temperature=0)
    chat = onecard.open_chat(run.root, max_new_tokens=8, temperature=0)
    assert chat.ask(QUESTION).text == text


def test_the_newest_run_goes_by_latest(
    tuner: Callable[..., "Runner"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tuner("llama", eval_fraction=0.25, max_steps=2, eval_steps=1, save_steps=1).start("run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "runs").symlink_to(run.root.parent)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (text,) = onecard.generate("latest", [QUESTION], max_new_tokens=4, temperature=0)
    assert [text] == onecard.generate(run.root, [QUESTION], max_new_tokens=4, temperature=0)
    assert onecard.evaluate("latest", checkpoints="last").checkpoints[0].step == 2
