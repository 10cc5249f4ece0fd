"""Tasks of lm-evaluation-harness give what its own Hugging Face backend gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from onecard.data.tokenizer import train_tokenizer
from onecard.errors import InputError
from onecard.evaluation.harness import HarnessSettings, HarnessTask
from onecard.evaluation.task import Result, Subject

ROWS = [
    {"text": f"the {word} of day {number}", "choices": [" dog", " lazy fox", " river bank"], "label": number % 3}
    for number, word in enumerate(("end", "long start", "sun", "moon and stars", "sea", "wind", "quiet night"))
]
CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
fewshot_split: train
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "{{{{text}}}} is like a"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 2.0}}
"""
WRITING = """
task: own_writing
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["e", "\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: own_rolling
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
KINDS = {"choice": CHOICE, "writing": WRITING, "rolling": ROLLING}


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], str]:
    pytest.importorskip("lm_eval", reason="needs the extra eval")

    def write(kind: str) -> str:
        data, path = tmp_path / "rows.jsonl", tmp_path / f"own_{kind}.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        path.write_text(KINDS[kind].format(data=data.as_posix()), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer("bytes", ())


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, settings_of: Callable[..., dict[str, Any]]) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = settings_of(request.param, vocab_size=300, max_position_embeddings=128, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()


def measure(name: str, model: PreTrainedModel, tokenizer: Any, batch_size: int, **changes: Any) -> Result:
    return HarnessTask(name, HarnessSettings(batch_size, **changes)).measure(
        Subject(model, tokenizer, {"weights": "w"})
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_the_harness_finds_itself(
    kind: str, files: Callable[[str], str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    path = files(kind)
    found = measure(path, model, tokenizer, 3)
    own = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=128),
        tasks=[path],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=1000,
    )
    (name,) = own["results"]
    expected = {
        f"{name}/{key.split(',')[0]}": value
        for key, value in own["results"][name].items()
        if "," in key and "_stderr" not in key
    }
    assert {score.name: pytest.approx(score.value, rel=1e-5) for score in found.scores} == expected
    for score in found.scores:
        error = own["results"][name].get(f"{score.name.split('/')[1]}_stderr,none")
        if isinstance(error, float) and "perplexity" not in score.name and "bits" not in score.name:
            assert score.standard_error == pytest.approx(error, rel=1e-5)
        assert score.n == len(ROWS)
    samples = own["samples"][name]
    mine = [row["responses"] for row in found.rows]
    if kind == "writing":
        assert mine == [sample["filtered_resps"] for sample in samples]
        assert any(text for row in mine for text in row)
    elif kind == "choice":
        pairs = zip(mine, (sample["filtered_resps"] for sample in samples), strict=True)
        for ours, theirs in pairs:
            assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-5)
            assert [verdict for _, verdict in ours] == [verdict for _, verdict in theirs]
    assert found.scores[0].protocol["weights"] == "w"
    assert found.scores[0].protocol["num_fewshot"] == (1 if kind == "choice" else 0)


def test_batches_and_limits(
    files: Callable[[str], str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = files("choice")
    task = HarnessTask(path, HarnessSettings(4))
    assert (task.name, task.ranks_by, task.is_lower_better, task.num_items) == (
        "own_choice",
        "own_choice/acc",
        False,
        len(ROWS),
    )
    whole = measure(path, model, tokenizer, 1)
    again = [measure(path, model, tokenizer, size) for size in (2, 64)]
    assert all(result.items.sums.tolist() == whole.items.sums.tolist() for result in again)
    limited = measure(path, model, tokenizer, 2, limit=3)
    assert limited.items.sums.tolist() == whole.items.sums.tolist()[:3]
    assert limited.scores[0].n == 3
    # One task measures many models: nothing of the first is left.
    assert task.measure(Subject(model, tokenizer, {})).items.sums.tolist() == whole.items.sums.tolist()
    assert task.measure(Subject(model, tokenizer, {})).items.sums.tolist() == whole.items.sums.tolist()
    rolling = HarnessTask(files("rolling"), HarnessSettings(4))
    assert (rolling.ranks_by, rolling.is_lower_better) == ("own_rolling/word_perplexity", True)


def test_what_cannot_be_loaded_is_said(files: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no such file"):
        HarnessTask(str(tmp_path / "none.yaml"), HarnessSettings(1))
    broken = tmp_path / "broken.yaml"
    broken.write_text(CHOICE.format(data=(tmp_path / "gone.jsonl").as_posix()), encoding="utf-8")
    with pytest.raises(InputError, match=r"broken.yaml cannot be loaded: .*gone.jsonl"):
        HarnessTask(str(broken), HarnessSettings(1))


def test_a_name_that_no_task_has_is_set_beside_those_like_it() -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    with pytest.raises(InputError, match=r"'hellaswga' is none of loss, ifeval and .* did you mean hellaswag"):
        HarnessTask("hellaswga", HarnessSettings(1))
    with pytest.raises(InputError, match=r"did you mean ifeval\?"):
        HarnessTask("IFevl", HarnessSettings(1))


def test_without_the_extra_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"arc_easy is neither loss nor ifeval, so it belongs to .*onecard\[eval\]"):
        HarnessTask("arc_easy", HarnessSettings(1))


def test_each_way_of_reading_answers_has_items_of_its_own(
    files: Callable[[str], str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = Path(files("writing"))
    filters = """
filter_list:
- {name: whole, filter: [{function: take_first}]}
- {name: nothing, filter: [{function: regex, regex_pattern: "(no such text)"}, {function: take_first}]}
"""
    path.write_text(path.read_text(encoding="utf-8") + filters, encoding="utf-8")
    task = HarnessTask(str(path), HarnessSettings(4))
    found = task.measure(Subject(model, tokenizer, {}))
    names = [score.name for score in found.scores]
    assert names == ["own_writing/exact_match,whole", "own_writing/exact_match,nothing"]
    assert task.ranks_by == names[0]
    assert len(found.items.sums) == len(ROWS)
    assert found.items.ratio()[0] == found.scores[0].value


def test_a_chat_names_its_template(
    files: Callable[[str], str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    path, found = files("writing"), []
    for end in ("a", "b"):
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + end
        (score,) = measure(path, model, tokenizer, 4, apply_chat_template=True).scores
        found.append(score.protocol["template"])
    assert len(set(found)) == 2
    assert "template" not in measure(path, model, tokenizer, 4).scores[0].protocol
