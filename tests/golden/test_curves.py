"""Loss curves of 20 steps for the shape of every shipped recipe, against silent change.

A curve is one recipe (its architecture, dropout, start, optimizer, rates and schedule) with tiny sizes on a tiny text,
in fp32 on a CPU. After a change that is meant to move them: `python tests/golden/test_curves.py` writes them anew, and
the commit says why.
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
}
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


def curve_of(name: str, folder: Path) -> Iterator[float]:
    """Losses of a scaled-down recipe, step by step."""
    from onecard.data import CorpusRequest, Source, StreamSettings, prepare
    from onecard.hardware import probe_machine
    from onecard.planner import Measurements, facts_of, make_plan
    from onecard.run.loop import seed_step
    from onecard.spec import apply_device
    from onecard.training.assemble import assemble
    from onecard.training.schedule import rate_at
    from onecard.training.step import place, train_step

    shipped = load_recipe(name)
    gated = {"num_key_value_heads": 2, "intermediate_size": 48}
    model = {key: value for key, value in dict(shipped.model_settings).items() if key != "head_dim"}
    changes = TINY | {"dataset": str(folder / "text"), "model_config": model}
    changes |= gated if model["model_type"] != "gpt2" else {}
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


def test_every_recipe_has_a_curve_and_every_curve_falls() -> None:
    curves = json.loads(CURVES.read_text(encoding="utf-8"))
    assert set(curves) == set(FROM_SCRATCH)
    assert all(len(curve) == NUM_STEPS and curve[-1] < curve[0] for curve in curves.values())


if __name__ == "__main__":
    written = {}
    for recipe_name in FROM_SCRATCH:
        with tempfile.TemporaryDirectory() as scratch:
            write_text(Path(scratch) / "text")
            written[recipe_name] = [round(loss, 6) for loss in curve_of(recipe_name, Path(scratch))]
        sys.stdout.write(f"{recipe_name}: {written[recipe_name][0]} -> {written[recipe_name][-1]}\n")
    CURVES.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
