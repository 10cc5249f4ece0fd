"""Fine-tuning from end to end: chats and an existing model in, a model that answers out, by each method."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eight_chats import ANSWERS, CHATS
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import onecard
from onecard.evaluation.heldout import HeldoutLoss
from onecard.observe.events import Event
from onecard.run.folder import RunFolder

if TYPE_CHECKING:
    from run.conftest import Runner


def ask(model: Path, **options: Any) -> list[str]:
    prompts = [str(chat[0]["content"]) for chat in CHATS]
    return onecard.generate(model, prompts, temperature=0, max_new_tokens=24, device="cpu", **options)


BY_HEART = {"learning_rate": 1e-2, "max_steps": 80, "warmup_ratio": 0.1, "chat_template": "default"}


def ask_transformers(model: Any, folder: Path, stop_ids: list[int]) -> list[str]:
    """Asks the first questions as somebody does who knows nothing of onecard."""
    tokenizer, answers = AutoTokenizer.from_pretrained(folder), list[str]()
    for chat in CHATS[:3]:
        prompt = tokenizer.apply_chat_template(
            chat[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=stop_ids)
        ids = out[0, prompt["input_ids"].shape[1] :]
        assert int(ids[-1]) in stop_ids, "the answer does not end"
        answers.append(str(tokenizer.decode(ids, skip_special_tokens=True)).strip())
    return answers


@pytest.mark.parametrize(("family", "template"), [("llama", "default"), ("qwen3", "chatml")])
def test_all_weights_learn_eight_chats_by_heart(family: str, template: str, tuner: Callable[..., "Runner"]) -> None:
    outcome = tuner(family).start("run", **BY_HEART | {"chat_template": template})
    assert ask(outcome.root) == ask(outcome.last) == list(ANSWERS)
    model, tokenizer = (kind.from_pretrained(outcome.last) for kind in (AutoModelForCausalLM, AutoTokenizer))
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>" if template == "chatml" else "<|endoftext|>")
    stops = GenerationConfig.from_pretrained(outcome.last).eos_token_id
    assert stop in stops
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert ask_transformers(model.eval(), outcome.last, stops) == list(ANSWERS[:3])


# PEFT asks transformers for a property by its old name (0.21 and 5.23).
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "template"), [("gpt2", "default"), ("llama", "chatml")])
def test_adapters_learn_eight_chats_by_heart_for_plain_peft(
    family: str, template: str, tuner: Callable[..., "Runner"], bases: Callable[[str], Path]
) -> None:
    from peft import PeftModel

    outcome = tuner(family, method="lora").start("run", **BY_HEART | {"chat_template": template})
    assert ask(outcome.root) == list(ANSWERS)
    assert not (outcome.last / "model.safetensors").exists()
    base, tokenizer = AutoModelForCausalLM.from_pretrained(bases(family)), AutoTokenizer.from_pretrained(outcome.last)
    if template == "chatml":
        assert len(tokenizer) == base.config.vocab_size + 2
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>" if template == "chatml" else "<|endoftext|>")
    model = PeftModel.from_pretrained(base, outcome.last).eval()
    assert ask_transformers(model, outcome.last, [stop]) == list(ANSWERS[:3])
    model.generation_config = GenerationConfig.from_pretrained(outcome.last)
    question = CHATS[0][:1]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    (written,) = model.generate(**asked, do_sample=False, max_new_tokens=64)
    assert written[-1] == stop
    assert written.tolist().count(stop) == asked["input_ids"].tolist()[0].count(stop) + 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_stop_token_that_the_base_never_trained_is_learned_beside_adapters(
    tuner: Callable[..., "Runner"], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    shutil.copytree(bases("llama"), tmp_path / "base")
    model, tokenizer = (kind.from_pretrained(tmp_path / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    stop = tokenizer.eos_token_id
    with torch.no_grad():  # tokens that only ever lose lie side by side
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[stop] = weight[stop - 1] * 1.001
    model.save_pretrained(tmp_path / "base")
    runner = tuner("llama", method="lora", model_name_or_path=str(tmp_path / "base"), **BY_HEART)
    outcome = runner.start("run")
    plan = RunFolder.open(outcome.root).plan()
    assert plan.model.learned_tokens == (stop,)
    assert "<|endoftext|>" in plan.reasons["model.base.untrained_tokens"]
    config = json.loads((outcome.last / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(map(tuple, config["trainable_token_indices"].values())) == {(stop,)}
    assert ask(outcome.root) == list(ANSWERS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(plain, outcome.last).eval()
    assert ask_transformers(adapted, outcome.last, [stop]) == list(ANSWERS[:3])


def test_adapters_beside_weights_in_4_bits_learn_eight_chats_by_heart(tuner: Callable[..., "Runner"]) -> None:
    outcome = tuner("qwen3", method="qlora").start("run", **BY_HEART)
    assert ask(outcome.root) == list(ANSWERS)


# Everything random and everything at intervals: what a resume could lose.
EVENTFUL = {
    "eval_fraction": 0.25,
    "learning_rate": 1e-2,
    "dropout": 0.1,
    "eval_steps": 2,
    "sample_steps": 3,
    "sample_prompts": ["Who sings?"],
    "sample_max_new_tokens": 4,
    "save_steps": 3,
    "total_batch_size": 5,
}


@pytest.mark.parametrize("packing", [True, False], ids=["flat", "off"])
@pytest.mark.parametrize(("family", "method"), [("gpt2", "full"), ("llama", "lora"), ("qwen3", "qlora")])
def test_killed_stopped_and_resumed_is_uninterrupted_bit_for_bit(
    family: str,
    method: str,
    packing: bool,
    tuner: Callable[..., "Runner"],
    stop_at: Callable[[int], Callable[[Event], None]],
) -> None:
    settings = EVENTFUL | ({} if method == "full" else {"lora_dropout": 0.1, "chat_template": "chatml"})
    runner = tuner(family, method=method, packing=packing, **settings)
    whole = runner.start("whole")
    assert RunFolder.open(whole.root).plan().packing == ("flat" if packing else "off")
    runner.kill("again", after_events=whole.kinds.index(("saved", 3)) + 2)
    runner.resume("again", on_event=stop_at(5))
    runner.resume("again").assert_equals(whole)
    assert [event["step"] for event in whole.events("evaluated")] == [2, 4, 6]
    assert [event["step"] for event in whole.events("sampled")] == [3, 6]


@pytest.mark.parametrize("name", ["dropout", "lora_dropout"])
def test_dropout_drops_in_fine_tuning(name: str, tuner: Callable[..., "Runner"]) -> None:
    runner = tuner("gpt2", method="lora", max_steps=2)
    losses = [[event["loss"] for event in runner.start(f"run-{p}", **{name: p}).events("step")] for p in (0.0, 0.5)]
    # Adapters start at zero, so what is dropped before them shows from the second step on.
    assert losses[0][1] != losses[1][1]
    assert (losses[0][0] == losses[1][0]) is (name == "lora_dropout")


def test_a_run_over_chats_keeps_best_record_samples_and_audit(
    tuner: Callable[..., "Runner"], monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining = iter([3.0, 2.0, 2.5, 2.2])
    scripted = lambda *_: HeldoutLoss(next(remaining), 0.0, 10)  # noqa: E731
    monkeypatch.setattr("onecard.run.crew.Crew.measure_heldout_loss", scripted)
    changes = {"max_steps": 12, "eval_steps": 2, "save_steps": 4, "early_stopping_patience": 2, "save_total_limit": 1}
    settings: dict[str, Any] = EVENTFUL | changes | {"report_to": "tensorboard"}
    outcome = tuner("llama", method="lora", **settings).start("run")
    finished = outcome.record[-1]
    assert (finished["reason"], finished["step"], finished["best_step"]) == ("early stopping", 8, 4)
    folder = RunFolder.open(outcome.root)
    assert folder.find_checkpoint("best").name == "step-000004"
    assert outcome.checkpoints == ["step-000004", "step-000008"]
    assert (
        ask(outcome.root) == ask(outcome.root / "checkpoints" / "step-000004") != ask(outcome.root, checkpoint="last")
    )
    assert list((outcome.root / "tensorboard").glob("events.out.tfevents.*"))
    (sample,) = outcome.events("sampled")[0]["samples"]
    assert sample["prompt"] == "Who sings?"
    audit = folder.audit()
    assert audit is not None
    assert audit.num_rows + audit.num_heldout_rows == len(CHATS)
    assert audit.num_heldout_rows > 0
