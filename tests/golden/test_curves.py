"""Loss curves of 20 steps for the shape of every shipped recipe, against silent change.

A curve is one recipe (its architecture, dropout, start, optimizer, rates and schedule) with tiny sizes on a tiny text,
in fp32 on a CPU. Fine-tuning recipes start from a tiny stand-in of their model, in a whole run. After a change that is
meant to move them: `python tests/golden/test_curves.py` writes them anew, and the commit says why.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecard.spec import load_recipe, recipe_names

FROM_SCRATCH = [name for name in recipe_names() if load_recipe(name).model_name_or_path is None]
FINE_TUNED = [name for name in recipe_names() if name not in FROM_SCRATCH]
CURVES = Path(__file__).parent / "curves.json"
NUM_STEPS = 20
TINY = {
    "tokenizer": "bytes",
    "vocab_size": None,
    "max_seq_length": 32,
    "total_batch_size": 5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": "auto",
    "max_steps": NUM_STEPS,
    "max_hours": None,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "device": "cpu",
    "precision": "fp32",
    "torch_compile": False,
    "dataset_num_proc": 1,
    "sample_prompts": [],
    "eval_tasks": "none",
}
NOT_OF_FINE_TUNING = {"tokenizer", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
GATED = {"num_key_value_heads": 2, "intermediate_size": 48}
# What TinyLlama's own tokenizer brings.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# A longer warmup than the run is cut with it.
WARMUP = {"warmup_steps": 5}


def write_text(path: Path) -> None:
    """The same documents on every machine and in every version of Python."""
    words = [f"{first}{second}" for first in "bdkmrst" for second in ("an", "ell", "ik", "or", "u")]
    generator, lines = random.Random(7), []
    for _ in range(400):
        lines.append(" ".join(words[int(generator.random() * len(words))] for _ in range(8)))
    path.mkdir()
    for index in range(0, len(lines), 5):
        (path / f"{index:03d}.txt").write_text("\n".join(lines[index : index + 5]), encoding="utf-8", newline="\n")


def write_chats(path: Path) -> None:
    """As many as a step takes, so that every step sees all of them; one with more rounds than some recipes keep."""
    chats = []
    for number, num_rounds in enumerate((1, 2, 1, 6, 3)):
        turns = [{"role": "system", "content": "Count."}] if number % 2 else []
        for turn in range(num_rounds):
            turns.append({"role": "user", "content": f"{number} and {turn}?"})
            turns.append({"role": "assistant", "content": f"{number + turn}, I think."})
        chats.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(chats), encoding="utf-8", newline="\n")


def write_base(path: Path, name: str) -> None:
    """A tiny model of the family of `name`, with a tokenizer that has the template and the tokens of that one."""
    from onecard.data.tokenizer import train_tokenizer
    from onecard.model.build import build_model
    from onecard.model.folder import save_model_folder

    tokenizer = train_tokenizer("bpe", ["Count. 0 and 1? 3, I think. System: User: Assistant: " * 20], 280)
    if "SmolLM2" in name:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if "TinyLlama" in name:
        tokenizer.chat_template = TEMPLATE
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    settings |= {"max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    settings |= {"model_type": "llama"} | GATED if "Llama" in name or "LM2" in name else {"model_type": "gpt2"}
    save_model_folder(build_model(settings, dropout=0.0, init="transformers", seed=1), {}, path)
    tokenizer.save_pretrained(path)


def curve_of_run(name: str, folder: Path) -> list[float]:
    """Losses of a whole run of a fine-tuning recipe as it is shipped, but for model, chats and sizes."""
    import onecard

    shipped = load_recipe(name)
    write_chats(folder / "chats.jsonl")
    write_base(folder / "base", str(shipped.model_name_or_path))
    changes = {key: value for key, value in TINY.items() if key not in NOT_OF_FINE_TUNING}
    changes |= {"dataset": str(folder / "chats.jsonl"), "model_name_or_path": str(folder / "base"), "eval_fraction": 0}
    changes |= {"max_seq_length": 256, "save_steps": 0, "report_to": "none"} | (WARMUP if shipped.warmup_steps else {})
    losses: list[float] = []
    recipe = load_recipe(name, **changes)
    kept = ("method", "optim", "learning_rate", "weight_decay", "warmup_ratio", "max_rounds", "chat_template", "lora_r")
    assert all(getattr(recipe, key) == getattr(shipped, key) for key in kept)
    root = onecard.train(
        recipe,
        output_dir=folder / "run",
        on_event=lambda event: losses.append(event.loss) if event.event == "step" else None,
    )
    assert onecard.generate(root, ["1 and 1?"], max_new_tokens=2, device="cpu")
    return losses


def curve_of(name: str, folder: Path) -> Iterator[float]:
    """Losses of a scaled-down recipe, step by step."""
    from onecard.data import CorpusRequest, Source, StreamSettings, prepare
    from onecard.hardware import probe_machine
    from onecard.planner import Measurements, facts_of, make_plan
    from onecard.run.stepping import seed_step
    from onecard.spec import apply_device
    from onecard.training.assemble import assemble
    from onecard.training.schedule import rate_at
    from onecard.training.step import place, train_step

    shipped = load_recipe(name)
    model = {key: value for key, value in dict(shipped.model_settings).items() if key != "head_dim"}
    changes = TINY | {"dataset": str(folder / "text"), "model_config": model}
    changes |= GATED if model["model_type"] != "gpt2" else {}
    changes |= WARMUP if shipped.warmup_steps else {}
    recipe = apply_device(load_recipe(name, **changes), "cpu")
    corpus = prepare(CorpusRequest((Source(str(folder / "text")),), tokenizer="bytes", num_proc=1, cache_dir=folder))
    facts = facts_of(corpus)
    plan = make_plan(recipe, probe_machine(), facts, Measurements(peak=lambda *_: 1e12, step=lambda _: 1.0))
    assert (plan.precision, plan.schedule.num_steps, plan.total_batch_size) == ("fp32", NUM_STEPS, 5)
    state = assemble(plan)
    stream = corpus.open_stream(StreamSettings(5, plan.micro_batch_size), plan.seed, plan.max_seq_length)
    for step in range(NUM_STEPS):
        batches = [place(batch, state) for batch in next(stream)]
        seed_step(plan.seed, step)
        rate = plan.optimizer.learning_rate * rate_at(plan.schedule, step)
        yield float(train_step(state, batches, rate, max_grad_norm=plan.optimizer.max_grad_norm).loss)


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_recipe_learns_as_it_did(name: str, tmp_path: Path) -> None:
    import torch

    if not torch.backends.mkl.is_available():
        pytest.skip("the curves were written with MKL, which draws another dropout")
    write_text(tmp_path / "text")
    expected = json.loads(CURVES.read_text(encoding="utf-8"))[name]
    assert list(curve_of(name, tmp_path)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_a_fine_tuning_recipe_trains_its_stand_in_as_it_did(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if load_recipe(name).method == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("onecard.planner.measure._PEAK_SIZE", {"cpu": 64})
    expected = json.loads(CURVES.read_text(encoding="utf-8"))[name]
    assert curve_of_run(name, tmp_path) == pytest.approx(expected, rel=1e-4)


def test_every_recipe_has_a_curve_and_every_curve_falls() -> None:
    curves = json.loads(CURVES.read_text(encoding="utf-8"))
    assert set(curves) == set(recipe_names())
    assert all(len(curve) == NUM_STEPS and curve[-1] < curve[0] for curve in curves.values())


if __name__ == "__main__":
    written = {}
    for recipe_name in recipe_names():
        with tempfile.TemporaryDirectory() as scratch:
            write_text(Path(scratch) / "text")
            curve = curve_of if recipe_name in FROM_SCRATCH else curve_of_run
            written[recipe_name] = [round(loss, 6) for loss in curve(recipe_name, Path(scratch))]
        sys.stdout.write(f"{recipe_name}: {written[recipe_name][0]} -> {written[recipe_name][-1]}\n")
    CURVES.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
