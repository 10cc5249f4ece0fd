"""No pickle is ever loaded: one that would run a command lies in every place that is read, and nothing runs."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import onecard
from onecard.errors import OnecardError

if TYPE_CHECKING:
    from run.conftest import Runner

NAMES = (
    *("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"),
    *("meta.pkl", "tokenizer.pkl", "tokenizer.pickle", "dataset.pkl", "cache.pkl", "tokens.npy", "state.pt"),
)


def plant(folder: Path, canary: Path) -> None:
    poison = b"cbuiltins\nopen\n(S'" + str(canary).encode() + b"'\nS'w'\ntR."
    head = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    array = head + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n" + poison
    for name in NAMES:
        if not (folder / name).exists():
            (folder / name).write_bytes(array if name.endswith(".npy") else poison)


def plant_everywhere(root: Path, canary: Path) -> None:
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        plant(folder, canary)


def test_the_poison_works(tmp_path: Path) -> None:
    import pickle

    plant(tmp_path, tmp_path / "canary")
    with (tmp_path / "state.pt").open("rb") as file:
        pickle.load(file).close()
    assert (tmp_path / "canary").exists()


def test_no_pickle_beside_a_run_or_its_text_is_loaded(
    runner: "Runner", tmp_path: Path, stop_at: "Callable[[int], Any]", cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache = tmp_path / "own cache"
    shutil.copytree(cache, own_cache)
    monkeypatch.setenv("ONECARD_CACHE", str(own_cache))
    canary = tmp_path / "canary"
    stopped = runner.start("run", on_event=stop_at(4), max_steps=6)
    for root in (stopped.root, own_cache, tmp_path / "poems"):
        plant_everywhere(root, canary)
    runner.resume("run")
    onecard.verify(stopped.root, 2)
    onecard.generate(stopped.root, ["the "], max_new_tokens=2)
    onecard.evaluate(stopped.root)
    onecard.export(stopped.root, to="hf", output=tmp_path / "exported")
    onecard.prepare(runner.recipe())
    assert not canary.exists()


def test_a_model_of_which_only_a_pickle_is_left_is_refused(runner: "Runner", tmp_path: Path) -> None:
    outcome = runner.start("run", max_steps=3)
    canary, bare = tmp_path / "canary", tmp_path / "bare"
    shutil.copytree(outcome.last, bare)
    (bare / "model.safetensors").unlink()
    (bare / "manifest.json").unlink()
    plant(bare, canary)
    with pytest.raises(OnecardError):
        onecard.generate(bare, ["the "], max_new_tokens=2)
    recipe = {"model_name_or_path": str(bare), "dataset": str(runner.text), "device": "cpu", "max_steps": 2}
    with pytest.raises(OnecardError):
        onecard.train(onecard.load_recipe(recipe), output_dir=tmp_path / "from bare")
    # A config that asks for code of its own gets none run.
    config = json.loads((bare / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (bare / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (bare / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(OnecardError):
        onecard.generate(bare, ["the "], max_new_tokens=2)
    assert not canary.exists()


def test_no_answer_on_standard_input_lets_code_of_a_model_run(
    runner: "Runner", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks whether to run the code of a model it does not know, unless it is told not to."""
    import io

    outcome = runner.start("run", max_steps=2)
    canary = tmp_path / "canary"
    for name, kind in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        model = tmp_path / kind
        shutil.copytree(outcome.last, model)
        (model / "manifest.json").unlink()
        document = json.loads((model / name).read_text(encoding="utf-8"))
        document |= {kind: "Evil", "auto_map": {"AutoConfig": "evil.E", "AutoTokenizer": ["evil.E", "evil.E"]}}
        (model / name).write_text(json.dumps(document), encoding="utf-8")
        (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n", encoding="utf-8")
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        # An unknown class of tokenizers is no harm: tokenizer.json says all.
        with pytest.raises(OnecardError) if kind == "model_type" else nullcontext():
            onecard.generate(model, ["the "], max_new_tokens=2)
        assert not canary.exists()


def test_a_column_of_a_type_that_is_pickled_is_read_as_what_it_holds(tmp_path: Path) -> None:
    """Older versions of Arrow unpickle what a file says of its types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from onecard.data.row_files import Row, read_row_file

    canary, file = tmp_path / "canary", tmp_path / "rows.parquet"
    poison = b"cbuiltins\nopen\n(S'" + str(canary).encode() + b"'\nS'w'\ntR."
    told = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": poison}
    schema = pa.schema([pa.field("text", pa.string(), metadata=told)])
    pq.write_table(pa.table([pa.array(["a"])], schema=schema), file)
    assert list(read_row_file(file, "parquet", "rows")) == [Row("rows[0]", {"text": "a"})]
    assert not canary.exists()
