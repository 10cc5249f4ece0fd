"""From a recipe to a plan without open questions."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.cli.plan_text import reason_rows
from onecard.errors import DoesNotFitError, InputError, RecipeError
from onecard.hardware import Machine, find_card
from onecard.planner import Measurements, check_recipe, choose, choose_device, make_plan, micro_batch
from onecard.planner.device import Target, keep_reserve, target_of_card
from onecard.planner.requirements import check_quantizing
from onecard.planner.schedule import count_steps, resolve_batch
from onecard.spec import CorpusFacts, Plan, Recipe, apply_device, load_recipe, recipe_names

MACHINE = Machine(
    gpus=(),
    gpu_problem=None,
    driver=None,
    num_cores=6,
    ram_bytes=8 * 2**30,
    free_ram_bytes=4 * 2**30,
    platform="linux",
    python="3.11.0",
    has_bf16_cpu=False,
    bf16_cpu_reason="a test",
)
FAST = Measurements(
    peak=lambda device, precision: 1e15, step=lambda plan: 0.5, micro_batches=lambda plan, sizes, budget_s: {}
)
SMALL = {
    "dataset": "text.txt",
    "tokenizer": "char",
    "max_seq_length": 64,
    "model_config": {"model_type": "qwen3", "intermediate_size": 64},
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_steps": 100,
    "device": "cpu",
}


def facts(**changes: Any) -> CorpusFacts:
    given = {
        "vocab_size": 97,
        "num_train_tokens": 1_000_000,
        "num_heldout_tokens": 50_000,
        "train_bytes": 4_000_000,
        "heldout_bytes": 200_000,
        "separator_id": 0,
        "fingerprint": "test",
    }
    return CorpusFacts(**given | changes)


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried on this machine before decides nothing here."""
    monkeypatch.setattr(micro_batch, "cache_folder", lambda: tmp_path / "cache")


def plan_of(
    *, corpus: CorpusFacts | None = None, machine: Machine = MACHINE, measurements: Measurements = FAST, **changes: Any
) -> Plan:
    values = {key: value for key, value in (SMALL | changes).items() if value is not None}
    recipe = apply_device(load_recipe(values), "cpu")
    return make_plan(recipe, machine, corpus or facts(), measurements)


def refusal(**changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan_of(**changes)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_becomes_a_plan_without_auto(name: str) -> None:
    for size in (None, *load_recipe(name).sizes):
        recipe = apply_device(load_recipe(name, size=size) if size else load_recipe(name), "cpu")
        vocabulary = recipe.vocab_size or 97
        plan = make_plan(recipe, MACHINE, facts(vocab_size=vocabulary, num_train_tokens=10**7), FAST)
        assert '"auto"' not in plan.model_dump_json()
        assert Plan.model_validate_json(plan.model_dump_json()) == plan
        assert plan.num_micro_batches * plan.micro_batch_size >= plan.total_batch_size
        assert plan.schedule.num_warmup_steps <= plan.schedule.num_steps
        assert plan.model.num_parameters > 10_000
        assert all(plan.reasons.values())
        assert all(value for _, value, _ in reason_rows(plan))


def test_the_published_shapes_have_their_published_sizes() -> None:
    def parameters(name: str, vocab_size: int, **changes: Any) -> float:
        recipe = apply_device(load_recipe(name, **changes), "cpu")
        return make_plan(recipe, MACHINE, facts(vocab_size=vocab_size), FAST).model.num_parameters / 1e6

    assert parameters("rtx-5060-pretrain", 32768) == pytest.approx(74.7, abs=0.1)
    assert parameters("shakespeare-char", 66) == pytest.approx(10.7, abs=0.1)
    assert parameters("a6000-pretrain", 32768, size="small") == pytest.approx(25, rel=0.2)
    assert parameters("a6000-pretrain", 32768, size="medium") == pytest.approx(125, rel=0.05)
    assert parameters("a6000-pretrain", 32768, size="large") == pytest.approx(350, rel=0.05)


def test_the_loss_is_cut_into_chunks_unless_asked_otherwise() -> None:
    plan = plan_of(corpus=facts(vocab_size=5000), vocab_size=None)
    # 16 MiB of fp32 logits at once, of a vocabulary padded to 5,056.
    assert plan.loss_chunk_size == 16 * 2**20 // (4 * 5056)
    assert "loss_chunk_size" in plan.reasons
    for given in ("full", 100):
        plan = plan_of(loss_chunk_size=given)
        assert plan.loss_chunk_size == given
        assert "loss_chunk_size" not in plan.reasons
    with pytest.raises(RecipeError, match="loss_chunk_size"):
        plan_of(loss_chunk_size="half")


def test_the_environment_may_leave_a_share_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of_card(find_card("rtx-3060-12gb"), "linux")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    recipe = load_recipe(SMALL | {"device": "cuda"})

    def limit(text: str, **changes: Any) -> int | None:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", text)
        changed = recipe.model_copy(update=changes)
        return choose._memory_limit(changed, target)

    assert limit("") == target.limit_bytes
    assert limit("per_process_memory_fraction:0.25") == target.card.memory_bytes // 4
    assert limit("per_process_memory_fraction:0.25", memory_limit_gb=1.0) == 2**30
    assert limit("per_process_memory_fraction:1.0") == target.limit_bytes


MICRO, ACCUMULATION, TOTAL = "per_device_train_batch_size", "gradient_accumulation_steps", "total_batch_size"
BATCHES: list[tuple[dict[str, int], tuple[int, int, int]]] = [
    ({MICRO: 8, ACCUMULATION: 3}, (8, 24, 3)),
    ({MICRO: 8}, (8, 8, 1)),
    ({MICRO: 8, TOTAL: 20}, (8, 20, 3)),
    ({ACCUMULATION: 4, TOTAL: 20}, (5, 20, 4)),
    ({ACCUMULATION: 3, TOTAL: 8}, (3, 8, 3)),
    ({MICRO: 8, ACCUMULATION: 3, TOTAL: 24}, (8, 24, 3)),
    ({TOTAL: 7}, (7, 7, 1)),
    ({TOTAL: 300}, (128, 300, 3)),
    ({"total_batch_tokens": 64 * 10 + 63}, (10, 10, 1)),
    ({"total_batch_tokens": 64 * 20, MICRO: 6}, (6, 20, 4)),
    ({}, (128, 128, 1)),
    ({ACCUMULATION: 4}, (32, 128, 4)),
    ({ACCUMULATION: 500}, (1, 500, 500)),
]


@pytest.mark.parametrize(("given", "expected"), BATCHES, ids=[str(given) for given, _ in BATCHES])
def test_the_effective_batch_is_what_was_asked_for(given: dict[str, int], expected: tuple[int, int, int]) -> None:
    plan = plan_of(**given)
    assert (plan.micro_batch_size, plan.total_batch_size, plan.num_micro_batches) == expected
    assert plan.tokens_per_step == expected[1] * 64


@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "epochs", "total", "num_steps"),
    [(10, 1001, 1, 5, 2), (10, 999, 1, 5, 2), (11, 1001, 1, 5, 3), (4096, 2_345_678, 5, 64, 320), (10, 91, 2.5, 5, 5)],
)
def test_an_epoch_of_chats_is_each_of_them_once(
    num_rows: int, num_tokens: int, epochs: float, total: int, num_steps: int
) -> None:
    recipe = Recipe(task="sft", num_train_epochs=epochs, model_name_or_path="x", optim="adamw")
    corpus = facts(num_train_rows=num_rows, num_train_tokens=num_tokens)
    assert count_steps(recipe, corpus, total, reasons := {}) == num_steps
    assert f"{epochs:g} x " in reasons["schedule.num_steps"]


def test_arithmetic_per_token_of_chats_counts_attention_over_one_of_mean_length() -> None:
    from onecard.planner.choose import _attended_length

    recipe = Recipe(max_seq_length=64)
    assert _attended_length(recipe, facts()) == 64
    assert _attended_length(recipe, facts(num_train_rows=100, num_train_tokens=1000)) == 10


def test_a_number_of_micro_batches_is_kept_or_refused() -> None:
    message = refusal(**{ACCUMULATION: 4, TOTAL: 9})
    assert "set gradient_accumulation_steps to 3, or the total to 12" in message
    for total in range(1, 40):
        for accumulation in range(1, total + 1):
            try:
                batch = resolve_batch(Recipe(**{ACCUMULATION: accumulation, TOTAL: total}), "cpu", {})
            except InputError:
                continue
            assert -(-batch.total // batch.micro) == accumulation


def test_long_sequences_go_one_by_one() -> None:
    plan = plan_of(max_seq_length=100_000, corpus=facts(num_train_tokens=10**7))
    assert (plan.micro_batch_size, plan.total_batch_size, plan.eval_batch_size) == (1, 1, 1)


def test_the_evaluation_batch_is_the_one_given() -> None:
    assert plan_of(per_device_eval_batch_size=3).eval_batch_size == 3
    assert plan_of(**{MICRO: 200, TOTAL: 400}).eval_batch_size == 200


def test_durations() -> None:
    batch = {TOTAL: 10, "max_steps": None}  # 640 tokens per step
    assert plan_of(**batch | {"max_steps": 33}).schedule.num_steps == 33
    epochs = plan_of(**batch, num_train_epochs=1.5)
    assert epochs.schedule.num_steps == 2344
    assert epochs.reasons["schedule.num_steps"] == "1.5 x 1.00M tokens"
    assert plan_of(**batch, max_tokens=641).schedule.num_steps == 2
    hours = plan_of(**batch, max_hours=0.1)
    assert hours.schedule.num_steps == 720
    assert hours.reasons["schedule.num_steps"] == "6:00 at 0.5 s per step, measured"
    assert "no duration is given" in refusal(max_steps=None)


def test_hours_cut_a_longer_run_and_leave_a_shorter_one() -> None:
    cut = plan_of(max_steps=1000, max_hours=0.1)
    assert cut.schedule.num_steps == 720
    assert "measured" in cut.reasons["schedule.num_steps"]
    left = plan_of(max_steps=100, max_hours=0.1)
    assert left.schedule.num_steps == 100
    assert left.reasons["schedule.num_steps"].startswith("100 steps, over before 6:00")
    assert plan_of(max_steps=None, max_hours=1e-9).schedule.num_steps == 1


def test_intervals_and_warmup_follow_the_steps_that_hours_allow() -> None:
    plan = plan_of(max_steps=None, max_hours=0.1, warmup_ratio=0.1, save_steps=0)
    assert (plan.eval_steps, plan.sample_steps, plan.save_steps) == (72, 72, 720)
    assert (plan.schedule.num_warmup_steps, plan.schedule.num_decay_steps) == (72, 288)
    assert plan_of(max_steps=None, max_hours=10, warmup_steps=5000).schedule.num_warmup_steps == 5000


def test_the_schedule() -> None:
    plan = plan_of()
    assert (plan.schedule.name, plan.schedule.num_warmup_steps, plan.schedule.num_decay_steps) == ("wsd", 2, 40)
    cosine = plan_of(lr_scheduler_type="cosine", warmup_steps=30)
    assert (cosine.schedule.num_warmup_steps, cosine.schedule.num_decay_steps) == (30, 70)
    assert plan_of(warmup_steps=80).schedule.num_decay_steps == 20
    assert plan_of(warmup_steps=100).schedule.num_warmup_steps == 100
    assert "warmup_steps 101 is more than the 100 steps of the run" in refusal(warmup_steps=101)
    assert "lr_scheduler_type 'no_such:shape' cannot be used" in refusal(lr_scheduler_type="no_such:shape")


@pytest.mark.parametrize(("steps", "share", "expected"), [(0, 0.1, 10), (7, 0.1, 7), (0, None, 0), (7, 0.0, 7)])
def test_steps_of_warmup_win_over_its_share_unless_they_are_none(
    steps: int, share: float | None, expected: int
) -> None:
    plan = plan_of(warmup_steps=steps, warmup_ratio=share)
    assert plan.schedule.num_warmup_steps == expected
    assert ("warmup_ratio beside it" in plan.reasons.get("schedule.num_warmup_steps", "")) == (
        steps == 7 and share == 0.1
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise SystemExit('bye') if 0.6 < p < 0.7 else None", "raises SystemExit: bye after "),
        ("return {}[p] if 0.6 < p < 0.7 else 1.0", "raises KeyError: "),
        ("return -1.0 if 0.6 < p < 0.7 else 1.0", "it gives -1.0 after "),
    ],
)
def test_a_schedule_of_the_users_own_is_run_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    (tmp_path / "own_curve.py").write_text(f"def shape(p):\n    if not 0.6 < p < 0.7: return 1.0\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_curve", raising=False)
    assert message in refusal(lr_scheduler_type="own_curve:shape")


def test_what_needs_no_text_is_refused_together_before_it_is_prepared() -> None:
    changes = {"precision": "fp16", "warmup_steps": 200, "model_config": {"model_type": "qwen-99"}, "name": "mine"}
    with pytest.raises(RecipeError, match="recipe mine: 3 problems") as caught:
        check_recipe(apply_device(load_recipe(SMALL | changes), "cpu"), MACHINE)
    for part in ("fp16 is for GPUs", "'qwen-99' is unknown", "warmup_steps 200 is more than the 100 steps"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_passes_the_check_without_its_text(name: str) -> None:
    check_recipe(apply_device(load_recipe(name), "cpu"), MACHINE)


def test_a_model_larger_than_the_memory_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match=r"a model of .*B parameters needs .* GiB .* 4\.0 GiB of memory are free"):
        plan_of(hidden_size=65536, num_hidden_layers=10)


def test_precision_follows_the_device() -> None:
    from dataclasses import replace

    assert plan_of().precision == "fp32"
    assert plan_of(machine=replace(MACHINE, has_bf16_cpu=True)).precision == "bf16"
    assert plan_of(precision="bf16").precision == "bf16"
    assert plan_of(precision="bf16").reasons["precision"] == "asked for"
    assert "precision fp16 is for GPUs" in refusal(precision="fp16")


def test_paged_state_needs_a_card_under_linux() -> None:
    assert "needs a GPU" in refusal(optim="paged_adamw")
    assert "Use optim adamw_8bit" in refusal(optim="paged_adamw_8bit")
    recipe, card = Recipe(**SMALL, optim="paged_adamw"), find_card("rtx-3060-12gb")
    with pytest.raises(InputError, match=r"needs Linux.*Use optim adamw_8bit"):
        check_recipe(recipe, MACHINE, target_of_card(card, "windows"))
    with pytest.raises(InputError, match=r"needs Linux"):
        check_recipe(recipe, MACHINE, target_of_card(card, "wsl"))
    check_recipe(recipe, MACHINE, target_of_card(card, "linux"))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw"])
def test_what_bitsandbytes_does_is_refused_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=rf"optim {name} needs bitsandbytes.*onecard\[quant\].*optim adamw"):
        check_recipe(Recipe(**SMALL, optim=name), MACHINE, target_of_card(find_card("rtx-3060-12gb"), "linux"))


def test_weights_in_4_bits_are_refused_on_cards_older_than_pascal() -> None:
    qlora = Recipe(model_name_or_path="gpt2", method="qlora", dataset="chats.jsonl", task="sft")
    pascal = target_of_card(find_card("gtx-1080-ti"), "windows")
    maxwell = replace(pascal, name="GTX 980 Ti", capability=(5, 2))
    with pytest.raises(InputError, match=r"GTX 980 Ti.*capability 6\.0 or newer.*the card has 5\.2\. Use method lora"):
        check_quantizing(qlora, maxwell)
    check_quantizing(qlora.model_copy(update={"method": "lora"}), maxwell)
    for target in (pascal, Target("cpu", "asked for")):
        check_quantizing(qlora, target)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto", MACHINE) == ("cpu", "no NVIDIA GPU found")
    for wish, message in (
        ("cuda", "no NVIDIA GPU was found on this machine"),
        ("cuda:1", "no NVIDIA GPU was found on this machine"),
        ("cuda:x", "unknown"),
        ("gpu", "unknown"),
    ):
        with pytest.raises(InputError, match=message):
            choose_device(wish, MACHINE)


CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "codes", "build"),
    [((6, 1), CU130, "cu126"), ((12, 0), ["sm_80", "sm_90a"], "cu130"), ((9, 0), ["sm_75", "sm_86"], "cu130")],
)
def test_a_card_without_machine_code_is_refused(
    capability: tuple[int, int], codes: list[str], build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Some GTX")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: codes)
    with pytest.raises(InputError, match=rf"cuda cannot be used: .* has no code .*whl/{build}\. Or use --device cpu"):
        choose_device("cuda", MACHINE)
    device, reason = choose_device("auto", MACHINE)
    assert device == "cpu"
    assert reason.startswith("Some GTX is there, but this PyTorch")
    for supported in ((capability, [f"sm_{capability[0]}0"]), ((capability[0] + 1, 0), [f"compute_{capability[0]}0"])):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, found=supported[0]: found)
        monkeypatch.setattr("torch.cuda.get_arch_list", lambda found=supported[1]: found)
        assert choose_device("cuda", MACHINE) == ("cuda:0", "asked for")


@pytest.mark.parametrize(
    ("card", "cuda", "words"),
    [
        ("gtx-1080-ti", None, "PyTorch's cu130 build has no code for GTX 1080 Ti: install the cu126 build"),
        ("gtx-1080-ti", "12.6", None),
        ("rtx-5060", "12.6", "PyTorch's cu126 build has no code for RTX 5060: install the cu132 build"),
        ("rtx-5060", None, None),
        ("rtx-3060-12gb", "12.8", None),  # a build the catalogue does not know
    ],
)
def test_a_card_elsewhere_that_pytorch_has_no_code_for_is_named(
    card: str, cuda: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    target = target_of_card(find_card(card), "linux")
    assert (target.problem is None) == (words is None)
    assert (words or "a plan for") in target.reason


def test_a_gpu_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_arch_list", list)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device("cuda", MACHINE)[0] == "cuda:0"
    assert choose_device("cuda:1", MACHINE)[0] == "cuda:1"
    with pytest.raises(InputError, match=r"cuda:2 does not exist: PyTorch sees 2 GPU\(s\)"):
        choose_device("cuda:2", MACHINE)


def test_varlen_is_refused_where_it_cannot_run() -> None:
    message = refusal(attn_implementation="varlen", dropout=0.1)
    assert all(part in message for part in ("compute capability 8.0", "bf16 or fp16", "dropout is 0.1", "Use sdpa"))


@pytest.mark.parametrize(("size", "padded"), [(97, 97), (1023, 1023), (1025, 1088), (4096, 4096), (50257, 50304)])
def test_large_vocabularies_are_padded(size: int, padded: int) -> None:
    plan = plan_of(corpus=facts(vocab_size=size))
    assert plan.model.settings["vocab_size"] == padded
    assert ("model.settings.vocab_size" in plan.reasons) == (padded != size)


def test_a_vocabulary_given_must_hold_the_tokenizer() -> None:
    model = {"model_type": "qwen3", "intermediate_size": 64, "vocab_size": 90}
    assert "vocab_size 90, but the tokenizer has 97 tokens" in refusal(model_config=model)
    assert plan_of(model_config=model | {"vocab_size": 200}).model.settings["vocab_size"] == 200


def test_special_tokens_and_positions_come_from_the_corpus() -> None:
    settings = plan_of(corpus=facts(separator_id=5)).model.settings
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["max_position_embeddings"]) == (5, 5, 64)
    model = {"model_type": "llama", "intermediate_size": 64, "max_position_embeddings": 256}
    assert plan_of(model_config=model).model.settings["max_position_embeddings"] == 256
    assert "more than the model's 32 positions" in refusal(model_config=model | {"max_position_embeddings": 32})
    assert "more than the model's 32 positions" in refusal(model_config={"model_type": "gpt2", "n_positions": 32})


HEADS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 33, "num_attention_heads": 4}, "multiple"),
    ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
    ({"hidden_size": 36, "num_attention_heads": 4}, "head width 9 is odd"),
    ({"model_config": {"model_type": "llama", "intermediate_size": 8}, "hidden_size": 33}, "multiple"),
    ({"model_config": {"model_type": "gpt2"}, "hidden_size": 33}, "multiple|divisible"),
    ({"model_config": {"model_type": "qwen3", "hiden": 3}}, "no setting named hiden"),
    ({"model_config": {"model_type": "qwen-99"}}, "unknown to transformers"),
    ({"model_config": {"model_type": "xlnet", "d_head": 8}}, "'xlnet' and these settings cannot be built"),
    ({"model_config": {"model_type": "bart"}}, "bart has an encoder beside"),
    ({"model_config": {"model_type": "qwen3", "num_attention_heads": 0}}, "num_attention_heads is 0, but takes"),
    ({"model_config": {"model_type": "qwen3", "vocab_size": "abc"}}, "vocab_size is 'abc', but takes"),
    ({"model_config": {"model_type": "qwen3", "head_dim": -8}}, "head_dim is -8, but takes"),
    ({"model_config": {"model_type": "gpt2", "resid_pdrop": "abc"}}, "a dropout is a number of 0 or more"),
    ({"model_config": "Qwen/Qwen-99"}, "cannot load it as a model of the Hugging Face Hub"),
    ({"model_config": "x" * 300 + ".json"}, "cannot be read as a config"),
    ({"model_config": {"model_type": "vit"}, "num_hidden_layers": 1}, "'vit' is no causal language model"),
]


@pytest.mark.parametrize(("changes", "message"), HEADS, ids=[str(changes) for changes, _ in HEADS])
def test_shapes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(**changes)


def test_what_a_family_means_for_its_large_sizes_does_not_hold_for_a_small_one() -> None:
    settings = plan_of().model.settings
    assert (settings["head_dim"], settings["num_key_value_heads"]) == (8, 4)


def test_a_config_can_be_a_file_of_a_trained_model(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 96}
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (tmp_path, tmp_path / "config.json"):
        settings = plan_of(model_config=str(path), hidden_size=None).model.settings
        assert (settings["hidden_size"], settings["vocab_size"]) == (64, 97)
        assert settings["max_position_embeddings"] == 64
    assert "cannot be read as a config" in refusal(model_config=str(tmp_path / "none.json"))
    rope = {"rope_theta": 500000.0, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config | rope), encoding="utf-8")
    settings = plan_of(model_config=str(tmp_path), hidden_size=None).model.settings
    assert settings["rope_parameters"]["rope_theta"] == 500000.0
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    assert "holds a list" in refusal(model_config=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}), encoding="utf-8")
    assert "num_hidden_layers is 0" in refusal(model_config=str(tmp_path), num_hidden_layers=None)


def test_dropout_is_one_number() -> None:
    model = {"model_type": "gpt2", "attn_pdrop": 0.1, "resid_pdrop": 0.1}
    plan = plan_of(model_config=model)
    assert plan.model.dropout == 0.1
    assert not any("pdrop" in key for key in plan.model.settings)
    assert plan_of(model_config=model, dropout=0.3).model.dropout == 0.3
    assert plan_of(model_config={"model_type": "gpt2"}).model.dropout == 0.0
    assert "different dropouts" in refusal(model_config=model | {"embd_pdrop": 0.2})


def test_compiling_is_chosen_when_the_run_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**changes: Any) -> bool:
        slow = Measurements(peak=lambda device, precision: 1e9, step=lambda plan: 0.5)
        return plan_of(measurements=slow, **changes).torch_compile

    monkeypatch.setattr("onecard.planner.choose.find_compiler_problem", lambda device: None)
    assert not plan_of().torch_compile
    assert "before compiling pays" in plan_of().reasons["torch_compile"]
    assert chosen(max_steps=10_000)
    assert not chosen(max_steps=10)
    assert plan_of(max_steps=None, max_hours=1.0).torch_compile
    assert not plan_of(max_steps=None, max_hours=0.1).torch_compile
    assert not chosen(max_steps=10_000, torch_compile=False)
    assert plan_of(torch_compile=True).torch_compile

    for module in ("choose", "requirements"):
        monkeypatch.setattr(f"onecard.planner.{module}.find_compiler_problem", lambda device: "no compiler")
    assert not chosen(max_steps=10_000)
    assert plan_of().reasons["torch_compile"] == "no compiler"
    assert "torch_compile cannot be used: no compiler" in refusal(torch_compile=True)


@pytest.mark.parametrize(
    ("card", "platform", "problem"),
    [
        ("gtx-1080-ti", "linux", "Triton needs compute capability 7.0 or newer, and GTX 1080 Ti has 6.1"),
        ("rtx-3060-12gb", "linux", None),
        ("rtx-3060-12gb", "wsl", None),
        ("rtx-3060-12gb", "windows", "PyTorch for Windows comes without Triton"),
    ],
)
def test_no_compiled_step_is_planned_where_there_is_no_compiler(
    card: str, platform: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "fit_ranks", lambda draft, *_: draft)
    target = target_of_card(find_card(card), platform)
    recipe = load_recipe(SMALL | {"device": "cuda", "max_steps": 10**9})
    plan = make_plan(recipe, MACHINE, facts(), FAST, target)
    assert plan.torch_compile == (problem is None)
    # Without a length: the forecast has a better one than what this is judged by.
    assert plan.reasons["torch_compile"] == (problem or "pays back within the run")
    if problem:
        with pytest.raises(InputError, match=problem):
            make_plan(recipe.model_copy(update={"torch_compile": True}), MACHINE, facts(), FAST, target)


@pytest.mark.parametrize("model_type", ["mamba", "rwkv"])
def test_a_model_without_attention_runs_a_document_at_a_time(model_type: str) -> None:
    recipe = load_recipe(SMALL | {"model_config": {"model_type": model_type}, "num_attention_heads": None})
    plan = make_plan(recipe, MACHINE, facts(), FAST)
    assert plan.attn_implementation == "apart"
    assert "hands a state from token to token" in plan.reasons["attn_implementation"]
    assert plan.flops_per_token == 6 * plan.model.num_matrix_parameters  # and nothing for attention


HYBRID = {"num_key_value_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}


def test_layers_that_mix_documents_run_them_apart() -> None:
    def attention_of(*kinds: str) -> str:
        model_config = {"model_type": "lfm2", "layer_types": list(kinds)}
        return make_plan(
            load_recipe(SMALL | HYBRID | {"model_config": model_config}), MACHINE, facts(), FAST
        ).attn_implementation

    assert attention_of("conv", "full_attention") == "apart"
    assert attention_of("full_attention", "full_attention") == "sdpa"


def test_wsl_has_the_memory_of_windows_and_the_pytorch_of_linux() -> None:
    windows, wsl = (target_of_card(find_card("rtx-3060-12gb"), platform) for platform in ("windows", "wsl"))
    assert wsl.limit_bytes == windows.limit_bytes
    assert (wsl.allocator_platform, windows.allocator_platform) == ("linux", "win32")
    with pytest.raises(InputError, match="windows or wsl"):
        target_of_card(find_card("rtx-3060-12gb"), "macos")


def test_a_long_run_on_a_cpu_tries_its_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path))
    tried = replace(FAST, micro_batches=lambda plan, sizes, budget_s: {size: float(size) for size in sizes})
    auto = {"max_steps": None, "max_hours": 1.0, "measurements": tried}
    sizes = {plan_of(**auto, **given).micro_batch_size for given in ({"total_batch_size": 32}, {})}
    assert sizes == {4, 16}
    # What is given is binding.
    for given in ({MICRO: 32}, {ACCUMULATION: 1, TOTAL: 32}):
        assert plan_of(**auto, **given).micro_batch_size == 32


def test_a_missing_cpp_compiler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    from onecard.planner.device import Target, find_compiler_problem

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert find_compiler_problem(Target("cpu", "asked for")) == "no C++ compiler is installed"
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    assert find_compiler_problem(Target("cpu", "asked for")) is None


def test_a_corpus_that_is_too_small_is_refused() -> None:
    assert "64 tokens to train on, fewer than one block" in refusal(corpus=facts(num_train_tokens=64))
    plan_of(corpus=facts(num_train_tokens=65))
    assert "early_stopping_patience needs held-out text" in refusal(
        early_stopping_patience=2, corpus=facts(num_heldout_tokens=0)
    )
    sources = (("large", 10**6), ("small", 64))
    assert "source 'small' has 64 tokens" in refusal(corpus=facts(tokens_of_sources=sources))


def test_workers_and_cores() -> None:
    assert (plan_of().dataloader_num_workers, plan_of().dataset_num_proc) == (1, 6)
    plan = plan_of(dataloader_num_workers=0, dataset_num_proc=3)
    assert (plan.dataloader_num_workers, plan.dataset_num_proc) == (0, 3)


def test_arithmetic_per_token_counts_attention() -> None:
    short, long = (plan_of(max_seq_length=length) for length in (64, 128))
    assert short.flops_per_token == 6 * short.model.num_matrix_parameters + 6 * 2 * 32 * 64
    assert long.flops_per_token - short.flops_per_token == 6 * 2 * 32 * 64


def test_a_step_is_measured(tiny_plan: Callable[..., Plan]) -> None:
    from onecard.planner.measure import measure_step

    one = measure_step(tiny_plan(micro_batch_size=4, total_batch_size=4))
    # Scaled to the whole step, of which only a micro-batch is run.
    assert measure_step(tiny_plan(micro_batch_size=4, total_batch_size=400)) > 10 * one > 0


@pytest.mark.parametrize("packing", ["off", "rows", "flat"])
def test_a_step_of_chats_is_measured_as_the_run_lays_it_out(packing: str, tiny_plan: Callable[..., Plan]) -> None:
    from onecard.planner import measure

    chats = facts(num_train_tokens=1000, num_train_rows=100, num_target_tokens=400)
    changes = {"task": "sft", "packing": packing, "corpus": chats, "micro_batch_size": 4, "total_batch_size": 2000}
    plan = tiny_plan(**changes)
    batches, share = measure._random_chats(plan, is_cpu=True)
    held = sum(batch.num_tokens for batch in batches)
    assert held / share == pytest.approx(2000 * 9, rel=0.05)  # the last token of a chat is only ever a target
    assert sum(batch.num_targets for batch in batches) == pytest.approx(0.4 * held, rel=0.2)
    assert held <= measure._STEP_TOKENS
    computed = sum(batch.ids.numel() for batch in batches)
    assert (computed == held) is (packing == "flat")
    assert max(batch.ids.numel() for batch in batches) <= 4 * plan.max_seq_length
    few = tiny_plan(**changes | {"total_batch_size": 20})
    assert measure_ratio(plan, few) > 10


def measure_ratio(large: Plan, small: Plan) -> float:
    from onecard.planner.measure import measure_step

    return measure_step(large) / measure_step(small)


def test_the_peak_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from onecard.planner import measure

    monkeypatch.setattr(measure, "_PEAK_SIZE", {"cpu": 128})
    assert 1e8 < measure.measure_peak("cpu", "fp32") < 1e14


def test_without_a_model_config_the_model_is_a_small_one() -> None:
    shape = {"hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None}
    plan = plan_of(**shape, model_config={})
    assert (plan.model.settings["hidden_size"], plan.model.settings["num_hidden_layers"]) == (384, 6)
    assert 5e6 < plan.model.num_parameters < 2e7
    assert plan_of(**shape | {"hidden_size": 512}, model_config={}).model.settings["head_dim"] == 64


@pytest.mark.parametrize(("rows", "total", "interval"), [(100, 32, 4), (96, 32, 3), (5, 32, 1)])
def test_an_epoch_is_the_steps_that_take_every_chat_once(rows: int, total: int, interval: int) -> None:
    from onecard.planner.schedule import resolve_interval

    facts = dict.fromkeys(("vocab_size", "num_train_tokens", "num_heldout_tokens", "train_bytes", "heldout_bytes"), 9)
    corpus = CorpusFacts(**facts, separator_id=0, fingerprint="", num_train_rows=rows)
    steps = corpus.steps_per_epoch(total, 1024)
    assert (steps, resolve_interval("epoch", 3 * steps, steps)) == (interval, interval)


def test_a_reserve_is_taken_from_the_card_and_a_cpu_has_none() -> None:
    target = target_of_card(find_card("rtx-3060-12gb"), "linux")
    kept = keep_reserve(target, 2.0)
    assert (target.limit_bytes or 0) - (kept.limit_bytes or 0) == 2 * 2**30
    assert keep_reserve(target, 100.0).limit_bytes == 0
    assert keep_reserve(target, None) == target
    recipe = load_recipe(SMALL | {"device": "cpu", "reserve_gb": 2})
    assert choose._find_idle_limit(recipe, Target("cpu", "")) == "reserve_gb is for GPUs: on a CPU it changes nothing"


def test_hours_hold_fewer_steps_where_the_run_rests() -> None:
    hours = {"max_steps": None, "max_hours": 1.0}
    whole, half = (plan_of(**hours, max_power_share=share) for share in (None, 0.5))
    assert half.schedule.num_steps == whole.schedule.num_steps // 2
    assert "with its rests" in half.reasons["schedule.num_steps"]
