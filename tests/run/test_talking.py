"""A run of adapters answers the same whichever verb asks it."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The command, in a process of its own; gives its address."""
    command = [sys.executable, "-m", "onecard", "serve", str(run), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            said = server.stdout.readline()
            address = re.search(r"http://\S+", said)
            yield address.group() if address else pytest.fail(said + server.stderr.read())
        finally:
            server.kill()


def test_a_served_run_of_adapters_says_what_generate_says(tuner: Callable[..., "Runner"]) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    run = tuner("llama", method="lora", learning_rate=3e-2).start("run")
    idle = tuner("llama", method="lora", learning_rate=1e-12, max_steps=1).start("idle")
    (text,) = onecard.generate(run.root, [QUESTION], max_new_tokens=8, temperature=0)
    # A server that left the adapter out would say this.
    assert onecard.generate(idle.root, [QUESTION], max_new_tokens=8, temperature=0) != [text]
    asked = {"model": "run", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 8}
    with served(run.root) as address, openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(**asked).choices[0].message.content == text
        with client.chat.completions.create(**asked, stream=True) as stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == text


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
