"""Kinds of runs that are killed: each does something else while it trains, and ends the same every time.

plain     evaluation, samples and checkpoints at intervals
clock     checkpoints that a clock asks for, at other steps each time
tasks     every checkpoint scored by a task, the finalists over all items at the end
refused   five updates in a row that are not finite: the run goes back and leaves their samples out
chats     an existing model trained on chats
lora      the same by an adapter
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onecard.data.tokenizer import train_tokenizer
from onecard.evaluation.paired import Items
from onecard.evaluation.responses import respond
from onecard.evaluation.task import Result, Subject
from onecard.model.build import build_model
from onecard.model.folder import save_model_folder
from onecard.spec import Score

NUM_STEPS = 40
_PARTIAL, _SET_ASIDE = ".step-*.partial", "superseded-*"
_WORDS = ("sun", "moon", "star", "sea", "wind", "tree", "bird", "stone")
_BASE = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}

_TUNED = f"""
task: sft
max_seq_length: 48
max_steps: {NUM_STEPS}
total_batch_size: 8
per_device_train_batch_size: 3
eval_fraction: 0.0
save_steps: 3
save_total_limit: 4
dataloader_num_workers: 1
precision: fp32
torch_compile: false
device: cpu
report_to: [tensorboard]
"""


@dataclass(frozen=True)
class Way:
    """A recipe, flags beside it, what is changed in the process, and what shows that it saves or goes back."""

    recipe: Path
    flags: tuple[str, ...] = ()
    patch: Callable[[], None] | None = None
    save_steps: int = 3
    sign: str = _PARTIAL


def make_ways(folder: Path) -> dict[str, Way]:
    """The kinds of runs by name; writes the model and the chats that some of them need."""
    chats, base = folder / "chats.jsonl", folder / "base"
    turns = [[("user", f"What is the {word}?"), ("assistant", f"{word} " * 3)] for word in _WORDS]
    lines = [json.dumps({"messages": [{"role": who, "content": text} for who, text in chat]}) for chat in turns]
    chats.write_text("\n".join(lines), encoding="utf-8")
    tokenizer = train_tokenizer("bpe", ["\n".join(lines) * 4], 320)
    settings = _BASE | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    save_model_folder(build_model(settings, dropout=0.0, init="transformers", seed=3), {}, base)
    tokenizer.save_pretrained(base)
    plain, tuned = folder / "tiny.yaml", folder / "tuned.yaml"
    recipe = f"dataset: {chats}\nmodel_name_or_path: {base}\n{_TUNED}"
    tuned.write_text(recipe, encoding="utf-8")
    scored = [*_given("eval_tasks", "ifeval"), *_given("eval_limit", 12), *_given("eval_max_new_tokens", 4)]
    return {
        "plain": Way(plain),
        "clock": Way(plain, (*_given("save_minutes", 0.002), *_given("save_steps", 9)), save_steps=9),
        "tasks": Way(plain, (*scored, *_given("save_total_limit", 1)), score_letters),
        "refused": Way(plain, (), refuse_some, sign=_SET_ASIDE),
        "chats": Way(tuned),
        "lora": Way(tuned, _given("method", "lora")),
    }


def _given(name: str, value: object) -> tuple[str, str]:
    return f"--{name}", str(value)


class LettersTask:
    """Scores responses by how many of their characters are letters."""

    name = "ifeval"
    ranks_by = "letters"
    is_lower_better = False

    def __init__(self, settings: Any, report: Any) -> None:
        self._prompts = [f"the {word} " for word in _WORDS * 3][: settings.limit]
        self._settings = settings
        self._report = report
        self.num_items = len(self._prompts)
        self.fingerprint = f"letters of {self.num_items}"

    def measure(self, subject: Subject) -> Result:
        """Lets the model answer all prompts."""
        new_tokens = self._settings.max_new_tokens
        found = respond(subject, self._prompts, new_tokens, 5, self._report)
        sums = np.array([sum(map(str.isalpha, text)) for text in found.texts], float)
        items = Items(sums, np.ones(len(sums), int))
        value, error = items.ratio()
        score = Score(name="letters", value=value, standard_error=error, n=len(sums), protocol=subject.protocol)
        return Result((score,), items)


def score_letters() -> None:
    """Puts a task in the place of ifeval that needs nothing but the model."""
    from onecard.run import tasks

    tasks.make_task = lambda name, settings, report=None: LettersTask(settings, report)  # type: ignore[assignment]


def refuse_some() -> None:
    """Makes the loss of certain samples infinite, so many that five updates in a row are refused."""
    from onecard.run import stepping

    train_step = stepping.train_step

    def refuse(state: Any, *arguments: Any, **settings: Any) -> Any:
        if 14 <= state.progress.position // 8 < 19:
            state.loss_scale.value.fill_(float("inf"))
        try:
            return train_step(state, *arguments, **settings)
        finally:
            state.loss_scale.value.fill_(1.0)

    stepping.train_step = refuse
