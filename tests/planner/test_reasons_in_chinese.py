"""Whatever a plan gives as a reason, a Chinese report says in Chinese."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import onecard.model.families
import onecard.planner
import onecard.spec.fallback
from onecard.hardware import Machine, find_card
from onecard.planner import Measurements, choose, make_plan, micro_batch
from onecard.planner.device import target_of_card
from onecard.report.reasons import _REASONS, tell_reason
from onecard.report.words import Say
from onecard.spec import CorpusFacts, Plan, apply_device, load_recipe

_PLANNER = sorted(Path(onecard.planner.__file__).parent.glob("*.py"))
# Where others write reasons that plans take over, by the functions that return them.
_OTHERS = [Path(module.__file__ or "") for module in (onecard.model.families, onecard.spec.fallback)]
_REASONED = re.compile(
    r"choose_(device|precision|attention)|_choose_compile|_find_idle_limit|find_compiler_problem|_find_build_problem"
    r"|_missing_code|_torch_problem|explain_backend|_change"
)
# A value that no template takes for words of its own.
_VALUE = "x1"


def is_chinese(reason: str) -> bool:
    """No run of English words is left; names, numbers and what is to be typed are."""
    told = tell_reason(reason, Say("zh"))
    return told != reason and not re.search(
        r"[a-z]{2,} [a-z]{2,} [a-z]{2,}", re.sub(r"`.*?`|\(.*?\)|（.*?）", "", told)
    )


def text_of(node: ast.AST) -> str | None:
    """A string of the source with `_VALUE` for each of its values; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else _VALUE for part in node.values)
    return None


def is_template(text: str) -> bool:
    """Whether a translated reason has these words, for values that have words of their own say nothing here."""
    pattern = re.compile(".*".join(re.escape(part) for part in text.split(_VALUE)))
    return any(pattern.fullmatch(re.sub(r"\{\w+\}", _VALUE, english)) for english in _REASONS)


def texts_in(node: ast.AST) -> Iterator[str]:
    """Strings of an expression, whichever of its branches they are in."""
    if isinstance(node, ast.IfExp):
        yield from [*texts_in(node.body), *texts_in(node.orelse)]
    elif isinstance(node, ast.Tuple):
        yield from texts_in(node.elts[-1])  # what is chosen, and why
    elif (text := text_of(node)) is not None:
        yield text


def reasons_in(path: Path) -> Iterator[tuple[str, str]]:
    """What a module assigns to reasons, or returns as one, and where."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Subscript) and "reasons" in ast.unparse(target.value) for target in targets):
                yield from ((f"{path.name}:{node.lineno}", text) for text in texts_in(node.value))
        elif isinstance(node, ast.FunctionDef) and _REASONED.fullmatch(node.name):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from ((f"{path.name}:{inner.lineno}", text) for text in texts_in(inner.value))


def written() -> dict[str, str]:
    """Reasons as they stand in the source, by place; settings alone, such as `eager`, are none."""
    found = {place: text for path in [*_PLANNER, *_OTHERS] for place, text in reasons_in(path)}
    return {place: text.removeprefix("; ") for place, text in found.items() if " " in text}


def test_every_reason_of_the_source_has_a_translation() -> None:
    found = written()
    assert len(found) >= 45  # else the search has lost them
    untold = {place: text for place, text in found.items() if not (is_chinese(text) or is_template(text))}
    assert untold == {}


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
    peak=lambda device, precision: 1e12,
    step=lambda plan: 0.5,
    micro_batches=lambda plan, sizes, budget_s: {size: 1.0 / size for size in sizes},
)
SMALL: dict[str, Any] = {
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
KINDS: dict[str, dict[str, Any]] = {
    "steps": {},
    "epochs": {"max_steps": None, "num_train_epochs": 1.5, "eval_steps": "epoch"},
    "tokens": {"max_steps": None, "max_tokens": 100_000},
    "hours": {"max_steps": None, "max_hours": 0.1},
    "hours with rests": {"max_steps": None, "max_hours": 0.1, "max_power_share": 0.5},
    "hours that cut steps": {"max_steps": 100_000, "max_hours": 0.1},
    "hours that cut epochs": {"max_steps": None, "num_train_epochs": 900, "max_hours": 0.1},
    "hours that cut nothing": {"max_hours": 0.5},
    "a long run": {"max_steps": 10_000_000, "per_device_train_batch_size": "auto"},
    "batches": {"per_device_train_batch_size": 4, "total_batch_size": 16},
    "warmup twice": {"warmup_steps": 10, "warmup_ratio": 0.1},
    "limits of a card": {"memory_limit_gb": 4, "reserve_gb": 1},
    "a limit of a card": {"memory_limit_gb": 4},
    "asked for": {"precision": "bf16", "attn_implementation": "eager", "torch_compile": False},
    "gemma": {"model_config": {"model_type": "gemma2", "intermediate_size": 64}, "num_key_value_heads": 2},
    "mamba": {"model_config": {"model_type": "mamba"}, "num_attention_heads": None},
}
CARDS = {
    "rtx-3060-12gb on linux": ("rtx-3060-12gb", "linux", {}),
    "rtx-3060-12gb on windows": ("rtx-3060-12gb", "windows", {"memory_limit_gb": 400, "max_steps": 10_000_000}),
    "a card without bf16": ("gtx-1080-ti", "linux", {"max_steps": 10_000_000}),
}


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Makes a plan of a small recipe with changes, for this CPU or a card of the catalogue."""
    monkeypatch.setattr(micro_batch, "cache_folder", lambda: tmp_path / "cache")

    def make(card: str | None = None, host: str = "linux", machine: Machine = MACHINE, **changes: Any) -> Plan:
        corpus = CorpusFacts(
            vocab_size=4999,
            num_train_tokens=1_000_000,
            num_heldout_tokens=50_000,
            train_bytes=4_000_000,
            heldout_bytes=200_000,
            separator_id=0,
            fingerprint="test",
        )
        values = {key: value for key, value in (SMALL | changes).items() if value is not None}
        if card is None:
            return make_plan(apply_device(load_recipe(values), "cpu"), machine, corpus, FAST)
        recipe = apply_device(load_recipe(values | {"device": "auto"}), "cuda")
        return choose.make_plan(recipe, machine, corpus, FAST, target=target_of_card(find_card(card), host))

    return make


def untold(plan: Plan) -> list[str]:
    return [f"{key}: {reason}" for key, reason in plan.reasons.items() if not is_chinese(reason)]


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_for_this_machine_gives_its_reasons_in_chinese(name: str, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(**KINDS[name])
    assert plan.reasons
    assert untold(plan) == []


@pytest.mark.parametrize("name", CARDS)
def test_a_plan_for_a_card_gives_its_reasons_in_chinese(name: str, plan_of: Callable[..., Plan]) -> None:
    card, host, changes = CARDS[name]
    plan = plan_of(card, host, **changes)
    assert {"device", "micro_batch_size"} <= plan.reasons.keys()
    assert untold(plan) == []


def test_a_machine_with_bf16_says_so(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(machine=replace(MACHINE, has_bf16_cpu=True))
    assert untold(plan) == []
    assert not is_chinese("as nobody says it")
