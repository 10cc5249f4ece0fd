"""What is offered where a plan does not fit is typed as it stands, and gives what it promises."""

import re
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import DoesNotFitError
from onecard.hardware import Machine, find_card
from onecard.planner import Measurements, make_plan
from onecard.planner.device import Target, target_of_card
from onecard.spec import Alternative, CorpusFacts, Plan, load_recipe

MACHINE = Machine((), None, None, 4, 2**34, 2**33, "linux", "3.11", False, "a test")
FAST = Measurements(peak=lambda device, precision: 1e15, step=lambda plan: 0.5)
CORPUS = CorpusFacts(
    vocab_size=97,
    num_train_tokens=1_000_000,
    num_heldout_tokens=50_000,
    train_bytes=4_000_000,
    heldout_bytes=200_000,
    separator_id=0,
    fingerprint="test",
)
# As recipes do whose micro-batch is the batch: what they accumulate binds, too.
GIVEN: dict[str, Any] = {
    "dataset": "text.txt",
    "tokenizer": "char",
    "max_seq_length": 512,
    "model_config": {"model_type": "qwen3", "intermediate_size": 256},
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_steps": 100,
    "per_device_train_batch_size": 24,
    "gradient_accumulation_steps": 1,
    "torch_compile": False,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "home"))


@pytest.fixture
def target() -> Target:
    return target_of_card(find_card("rtx-3060-12gb"), "linux")


def plan_of(given: dict[str, Any], target: Target, **flags: str) -> Plan:
    return make_plan(load_recipe(given, **flags), MACHINE, CORPUS, FAST, target)


def peak_of(given: dict[str, Any], target: Target, **flags: Any) -> int:
    plan = plan_of(given, target, **flags)
    assert plan.forecast is not None
    return plan.forecast.memory.peak_bytes


def offered(error: DoesNotFitError) -> list[tuple[dict[str, str], Alternative]]:
    """The flags of each line of a message, and the figures beside them."""
    lines = str(error).splitlines()[1:]
    flags = [dict(re.findall(r"--(\w+) ([^\s:]+)", line)) for line in lines]
    assert error.plan is not None
    return list(zip(flags, error.plan.alternatives, strict=True))


@pytest.mark.parametrize("share", [0.45, 0.75])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"gradient_accumulation_steps": "auto", "total_batch_size": 24},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 12},
        {"gradient_accumulation_steps": "auto", "total_batch_tokens": 24 * 512, "per_device_eval_batch_size": 3},
    ],
)
def test_each_remedy_gives_what_stands_beside_it(
    batch: dict[str, Any], checkpointing: bool, share: float, target: Target
) -> None:
    given = GIVEN | {"gradient_checkpointing": checkpointing} | batch
    limit_gb = share * peak_of(given, target) / 2**30
    with pytest.raises(DoesNotFitError) as caught:
        plan_of(given | {"memory_limit_gb": limit_gb}, target)
    found = offered(caught.value)
    assert len(found) >= 2
    for flags, row in found:
        plan = plan_of(given | {"memory_limit_gb": limit_gb}, target, **flags)
        assert plan.forecast is not None
        assert plan.forecast.memory.fits
        assert plan.forecast.memory.peak_bytes == row.peak_bytes
        assert plan.forecast.time is not None
        assert plan.forecast.time.step_s == row.step_s
        assert plan.total_batch_size == 24
        assert plan.corpus == CORPUS


def test_the_environments_share_is_no_limit_to_raise(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    share = 0.5 * peak_of(GIVEN, target) / target.total_bytes
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"per_process_memory_fraction:{share:.6f}")
    with pytest.raises(DoesNotFitError) as caught:
        plan_of(GIVEN, target)
    assert "memory_limit_gb" not in str(caught.value)
