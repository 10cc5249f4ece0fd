"""The step of several processes is that of one: same losses, same gradient norms, same weights."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from steps_on_ranks import train

from onecard.model.build import count_parameters
from onecard.spec import AdaptPlan, Plan

WORKER = Path(__file__).with_name("steps_on_ranks.py")
Results = dict[int, list[dict[str, dict[str, Any]]]]


# 8 million parameters: what a process holds of them is seen from outside.
LARGE = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3, "tie_word_embeddings": True}
LORA = AdaptPlan(method="lora", r=4, lora_alpha=8)
# Micro-batches of a step, the model, and what else is asked for. An epsilon above rounding: Adam's first step would
# otherwise turn the noise of a zero gradient into a full step.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "in parts, large": (2, "llama", {"strategy": "fsdp", "settings": LARGE}),  # first, or memory of others would do
    "plain": (8, "qwen3", {}),
    "muon": (8, "qwen3", {"optimizer": "muon"}),
    "uneven": (5, "qwen3", {}),
    "fewer than ranks": (1, "qwen3", {}),
    "head of its own": (8, "llama", {"settings": {"tie_word_embeddings": False}}),
    "tied head": (8, "llama", {"settings": {"tie_word_embeddings": True}}),
    "dropout": (8, "gpt2", {"dropout": 0.2, "seeds_micro_batches": True}),
    "recomputed": (8, "qwen3", {"gradient_checkpointing": True}),
    "clipped": (8, "qwen3", {"max_grad_norm": 0.01}),
    "lora": (8, "llama", {"adapt": LORA}),
    "16 bits": (8, "qwen3", {"precision": "bf16"}),
    "16 bits, uneven, head of its own, recomputed": (
        *(5, "llama"),
        {"precision": "bf16", "settings": {"tie_word_embeddings": False}, "gradient_checkpointing": True},
    ),
    "16 bits, lora": (8, "llama", {"precision": "bf16", "adapt": LORA}),
    "fp16": (8, "gpt2", {"precision": "fp16"}),
    "in parts": (8, "qwen3", {"strategy": "fsdp"}),
    "in parts, 16 bits": (8, "qwen3", {"strategy": "fsdp", "precision": "bf16"}),
    "in parts, 16 bits, recomputed, muon": (
        *(8, "llama"),
        {"strategy": "fsdp", "precision": "bf16", "gradient_checkpointing": True, "optimizer": "muon"},
    ),
    "in parts, fp16": (8, "qwen3", {"strategy": "fsdp", "precision": "fp16"}),
    "in parts, muon": (5, "gpt2", {"strategy": "fsdp", "optimizer": "muon"}),
    "in parts, dropout": (8, "gpt2", {"strategy": "fsdp", "dropout": 0.2, "seeds_micro_batches": True}),
    "in parts, uneven": (5, "llama", {"strategy": "fsdp", "settings": {"tie_word_embeddings": False}}),
    "in parts, recomputed, tied": (
        *(8, "llama"),
        {"strategy": "fsdp", "settings": {"tie_word_embeddings": True}, "gradient_checkpointing": True},
    ),
    "in parts, experts": (  # which transformers stores one by one, under other names
        *(4, "llama"),
        {"strategy": "fsdp", "settings": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}},
    ),
    "in parts, clipped": (8, "gpt2", {"strategy": "fsdp", "max_grad_norm": 0.01}),
}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_plan: Callable[..., Plan],
    settings_of: Callable[..., dict[str, Any]],
    do_on_ranks: Callable[..., tuple[list[int], str]],
) -> Results:
    """What every case came to on one and on two ranks, by rank; they are started once, and this process is the one."""
    folder, cases = tmp_path_factory.mktemp("ranks"), {}
    for name, (num_micro_batches, family, changes) in CASES.items():
        settings = settings_of(family, **changes.get("settings", {}))
        plan = tiny_plan(family, **{"optimizer": "adamw", "adam_epsilon": 1e-4} | changes | {"settings": settings})
        cases[name] = {"plan": plan.model_dump(mode="json"), "num_micro_batches": num_micro_batches}
    plans = folder / "plans.json"
    plans.write_text(json.dumps(cases), encoding="utf-8")
    codes, errors = do_on_ranks(WORKER, 2, plans, folder / "out.json")
    assert codes == [0, 0], errors
    plain = {name: (Plan.model_validate(case["plan"]), case["num_micro_batches"]) for name, case in cases.items()}
    alone = {name: train(*case, folder) for name, case in plain.items()}
    return {1: [alone], 2: json.loads((folder / "out.json").read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", CASES)
def test_ranks_do_not_show(name: str, results: Results) -> None:
    alone, (one, other) = results[1][0][name], (found[name] for found in results[2])
    # To the bit between ranks, or they would drift apart; elsewhere sums come in another order.
    assert [one[key] for key in ("losses", "norms")] == [other[key] for key in ("losses", "norms")]
    assert other["weights"] in (one["weights"], [])
    assert one["num_targets"] == alone["num_targets"] > 0
    assert one["type_of_head"] == alone["type_of_head"]
    exact = 1e-2 if "16" in name else 1e-5
    assert one["losses"] == pytest.approx(alone["losses"], rel=exact)
    assert one["norms"] == pytest.approx(alone["norms"], rel=10 * exact)
    assert one["weights"] == pytest.approx(alone["weights"], rel=exact, abs=exact)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process that has just begun")
def test_no_rank_but_the_leader_holds_the_whole_state(
    results: Results, settings_of: Callable[..., dict[str, Any]]
) -> None:
    # Weights and two moments in fp32: each rank has half of them, and the leader the weights once more for a while.
    whole = 12 * count_parameters(settings_of("llama", **LARGE))[0]
    leader, other = (found["in parts, large"]["grown_bytes"] for found in results[2])
    assert 0.4 * whole < other < 0.8 * whole
    assert leader < 1.2 * whole


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("in parts")])
def test_each_rank_reads_its_part_of_a_checkpoint(name: str, results: Results) -> None:
    assert results[2][0][name]["is_read_again"]
