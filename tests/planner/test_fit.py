"""Forecasts for cards that are not here, and the settings that fit them."""

import gzip
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import DoesNotFitError, InputError
from onecard.hardware import find_card
from onecard.model.build import count_parameters
from onecard.planner import host_memory, trace_cache
from onecard.planner.depth import TracedPlan
from onecard.planner.device import Target, target_of_card
from onecard.planner.fit import FirstAnswer, fit_plan
from onecard.planner.forecast import forecast
from onecard.planner.ladder import list_alternatives
from onecard.planner.state_size import least_state
from onecard.spec import AdaptPlan, BasePlan, Plan, Recipe
from onecard.training.assemble import assemble

MIB = 2**20
# Weights that outweigh activations.
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "home"))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def target() -> Target:
    return target_of_card(find_card("rtx-3060-12gb"), "linux")


@pytest.fixture
def draft(tiny_plan: Callable[..., Plan], target: Target) -> Callable[..., Plan]:
    """A plan whose activations outweigh its weights; `limit` is in MiB."""

    def make(limit: float | None = None, **changes: Any) -> Plan:
        values = {"max_seq_length": 512, "micro_batch_size": 8, "total_batch_size": 8, "eval_batch_size": 8} | changes
        cap = target.limit_bytes if limit is None else int(limit * MIB)
        return tiny_plan("qwen3", precision="bf16", device="cuda:0", memory_limit_bytes=cap, **values)

    return make


def counted(plan: Plan) -> Plan:
    """The plan with the parameters that its model has."""
    total, matrices = count_parameters(plan.model.settings)
    counts = {"num_parameters": total, "num_matrix_parameters": matrices}
    return plan.model_copy(update={"model": plan.model.model_copy(update=counts)})


def recipe_of(**changes: Any) -> Recipe:
    return Recipe(dataset="x", **changes)


def test_the_parts_add_up_to_the_peak(draft: Callable[..., Plan], target: Target) -> None:
    memory = forecast(draft(), target).forecast.memory
    assert memory.fits
    assert sum(memory.breakdown.values()) == memory.peak_bytes + memory.context_bytes
    assert memory.breakdown["CUDA context"] == memory.context_bytes
    # Each kind has its row, even where there is nothing of it at the peak.
    kinds = {"weights", "gradients", "optimizer", "activations", "loss", "workspaces", "allocator slack"}
    assert kinds <= memory.breakdown.keys()
    assert memory.peak_low_bytes < memory.peak_bytes < memory.peak_high_bytes < memory.limit_bytes
    assert memory.breakdown["workspaces"] == 2 * 8_519_680
    assert memory.breakdown["activations"] > memory.breakdown["weights"]


def test_a_trace_is_made_once(draft: Callable[..., Plan], target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    first = forecast(draft(), target)
    monkeypatch.setattr(trace_cache, "trace_plan", None)
    again = forecast(draft(seed=5), target)
    assert (again.trace, again.forecast) == (first.trace, first.forecast)
    with pytest.raises(trace_cache.CannotTrace):
        forecast(draft(max_seq_length=256), target)


def test_varlen_is_forecast_as_flash_without_borders(draft: Callable[..., Plan], target: Target) -> None:
    varlen = forecast(draft(attn_implementation="varlen"), target).forecast.memory
    assert 0 < varlen.peak_bytes <= forecast(draft(), target).forecast.memory.peak_bytes


def test_a_phase_that_cannot_be_traced_is_told(
    draft: Callable[..., Plan], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no cache")

    monkeypatch.setattr("onecard.planner.trace.sample", fail)
    for _ in range(2):  # traced, and remembered
        memory = forecast(draft(sample_prompts=("a",)), target).forecast.memory
        assert memory.note == "sampling could not be traced (no cache), so what it takes is not in these figures"
        assert "sampling" not in memory.phase_bytes


def test_a_damaged_trace_is_made_again(draft: Callable[..., Plan], target: Target, tmp_path: Path) -> None:
    first = forecast(draft(), target)
    (file,) = (tmp_path / "cache" / "traces").iterdir()
    whole = file.read_bytes()
    for content in (b"nothing", whole[: len(whole) // 2], whole[:20] + b"damaged" + whole[27:], gzip.compress(b"[1]")):
        file.write_bytes(content)
        assert forecast(draft(), target) == first
        assert gzip.decompress(file.read_bytes()) == gzip.decompress(whole)


def test_rests_are_part_of_the_time_on_a_card(draft: Callable[..., Plan], target: Target) -> None:
    whole, half = (fit_plan(draft(max_power_share=share), recipe_of(), target).forecast.time for share in (None, 0.5))
    assert half.step_s == pytest.approx(2 * whole.step_s)
    assert half.total_s == pytest.approx(2 * whole.total_s)
    assert half.energy_wh == pytest.approx(whole.energy_wh)
    assert half.note.startswith("max_power_share 0.5: rests for 50% of the time; energy without")


def test_what_is_given_stays(draft: Callable[..., Plan], target: Target) -> None:
    recipe = recipe_of(per_device_train_batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=True)
    plan = fit_plan(draft(micro_batch_size=2, gradient_checkpointing=True), recipe, target)
    assert (plan.micro_batch_size, plan.gradient_checkpointing) == (2, True)
    assert plan.forecast is not None
    assert plan.forecast.memory.fits


def test_what_is_open_becomes_what_fits_and_the_batch_stays(draft: Callable[..., Plan], target: Target) -> None:
    whole = forecast(draft(), target).forecast.memory.peak_bytes / MIB
    chosen = [fit_plan(draft(limit), recipe_of(), target) for limit in (2 * whole, 0.8 * whole, 0.6 * whole)]
    assert [plan.total_batch_size for plan in chosen] == [8, 8, 8]
    sizes = [plan.micro_batch_size * (1 + plan.gradient_checkpointing) for plan in chosen]
    assert (chosen[0].micro_batch_size, chosen[0].gradient_checkpointing) == (8, False)
    assert chosen[1].micro_batch_size < 8 or chosen[1].gradient_checkpointing
    assert len(sizes) == 3
    for plan in chosen:
        assert plan.forecast is not None
        assert plan.memory_limit_bytes is not None
        assert plan.forecast.memory.peak_bytes <= plan.memory_limit_bytes
        assert "micro_batch_size" in plan.reasons


def test_no_micro_batch_that_fits_is_passed_over(draft: Callable[..., Plan], target: Target) -> None:
    shape = {"max_seq_length": 256, "total_batch_size": 64}
    sizes = (1, 2, 4, 8, 16, 32, 64)
    # What does not grow with the micro-batch (workspaces, slack) is most of what the smaller ones need.
    plans = [draft(micro_batch_size=size, eval_batch_size=size, **shape) for size in sizes]
    needed = [forecast(plan, target).forecast.memory.peak_bytes / MIB for plan in plans]
    for size, peak in zip(sizes[1:], needed[1:], strict=True):
        plan = fit_plan(draft(peak / 0.96, **shape), recipe_of(gradient_checkpointing=False), target)
        assert plan.micro_batch_size == max(other for other, least in zip(sizes, needed, strict=True) if least <= peak)
        assert plan.micro_batch_size >= size


def test_what_does_not_fit_names_what_would(draft: Callable[..., Plan], target: Target) -> None:
    whole = forecast(draft(), target).forecast.memory.peak_bytes / MIB
    given = recipe_of(per_device_train_batch_size=8, gradient_checkpointing=False)
    with pytest.raises(DoesNotFitError, match=r"does not fit RTX 3060 12GB: a step of 8 x 512 tokens needs") as caught:
        fit_plan(draft(0.7 * whole), given, target)
    assert caught.value.exit_code == 3
    assert "--per_device_train_batch_size" in str(caught.value)
    told = caught.value.plan
    assert not told.forecast.memory.fits
    assert all(row.fits and row.peak_bytes <= 0.7 * whole * MIB for row in told.alternatives)
    assert told.alternatives
    # `fit: auto` takes such a remedy by itself.
    freed = fit_plan(draft(0.7 * whole), given.model_copy(update={"fit": "auto"}), target)
    assert freed.forecast is not None
    assert freed.forecast.memory.fits


@pytest.mark.parametrize("is_here", [True, False])
def test_a_step_that_cannot_be_traced_is_no_end_where_it_can_be_tried(
    is_here: bool, draft: Callable[..., Plan], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a value was asked for")

    monkeypatch.setattr(trace_cache, "trace_plan", fail)
    target = replace(target, is_here=is_here)
    if is_here:
        plan = fit_plan(draft(), recipe_of(), target)
        assert plan.forecast is None
        assert "a value was asked for" in plan.reasons["forecast"]
    else:
        with pytest.raises(InputError, match="cannot be traced without its card: a value was asked for"):
            fit_plan(draft(), recipe_of(), target)


def test_a_limit_below_the_weights_says_so(draft: Callable[..., Plan], target: Target) -> None:
    words = "weights, gradients and optimizer state alone are .* and 204.8 KiB"
    with pytest.raises(DoesNotFitError, match=words) as caught:
        fit_plan(counted(draft(0.2)), recipe_of(), target)
    # Nothing but the limit is in the way, and there is no other method for a model from scratch.
    assert "method" not in str(caught.value)
    (row,) = caught.value.plan.alternatives
    assert row.fits
    assert f"--memory_limit_gb {row.settings['memory_limit_gb']}: " in str(caught.value)
    raised = draft(1024 * row.settings["memory_limit_gb"])
    plan = fit_plan(raised, recipe_of(per_device_train_batch_size=1, gradient_checkpointing=True), target)
    assert plan.forecast is not None
    assert plan.forecast.memory.fits


def test_a_limit_that_is_the_cards_own_cannot_be_raised(draft: Callable[..., Plan], target: Target) -> None:
    small = replace(target, limit_bytes=MIB // 5)
    with pytest.raises(DoesNotFitError, match="choose a smaller model, or a card with more memory") as caught:
        fit_plan(counted(draft(0.2)), recipe_of(), small)
    assert caught.value.plan.alternatives == ()


def test_what_no_trace_could_save_is_refused_without_one(
    draft: Callable[..., Plan], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_cache, "trace_plan", None)
    large = draft(optimizer="adamw")
    large = large.model_copy(update={"model": large.model.model_copy(update={"num_parameters": 72 * 10**9})})
    words = r"optimizer state alone are 120\d\.\d GiB, and 10\.9 GiB can be had"
    with pytest.raises(DoesNotFitError, match=words) as caught:
        fit_plan(large, recipe_of(), target)
    told = caught.value.plan.forecast
    assert not told.memory.fits
    assert told.memory.peak_bytes == 18 * 72 * 10**9
    assert "not traced" in told.memory.note


@pytest.mark.parametrize(
    ("method", "optimizer", "precision"),
    [
        ("full", "adamw", "bf16"),
        ("full", "muon", "fp32"),
        ("full", "adamw_8bit", "bf16"),
        ("full", "paged_adamw", "bf16"),
        ("lora", "adamw", "fp32"),
        ("lora", "adamw_8bit", "bf16"),
        ("qlora", "adamw", "bf16"),
    ],
)
def test_no_trace_needs_less_than_arithmetic_says(
    method: str,
    optimizer: str,
    precision: str,
    draft: Callable[..., Plan],
    settings_of: Callable[..., dict[str, Any]],
    target: Target,
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = {"base": BasePlan(name="existing"), "init": "pretrained", "settings": settings_of("llama", **WIDE)}
    adapt = None if method == "full" else AdaptPlan(method=method, r=8)
    small = {"micro_batch_size": 1, "eval_batch_size": 1, "total_batch_size": 1, "max_seq_length": 16}
    plan = counted(draft(optimizer=optimizer, adapt=adapt, **small, **base))
    plan = plan.model_copy(update={"precision": precision})
    memory, least = forecast(plan, target).forecast.memory, least_state(plan)
    assert sum(least.values()) <= memory.phase_bytes["update"]
    # Embeddings that stay as they are are most of what rests in 4 bits of a model this small.
    assert sum(least.values()) >= (0.3 if method == "qlora" else 0.5) * memory.phase_bytes["update"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_the_copy_of_a_state_is_counted_as_page_locked_memory_is_rounded(
    name: str, optimizer: str, tiny_plan: Callable[..., Plan]
) -> None:
    plan = tiny_plan(name, optimizer=optimizer)
    state = assemble(plan)
    copied = [*state.optimizer.masters.values(), *state.optimizer.state_tensors().values()]
    # Counters of steps are single numbers.
    sizes = [tensor.nbytes for tensor in copied if tensor.ndim]
    assert host_memory._page_locked_bytes(plan) == sum(2 ** math.ceil(math.log2(size)) for size in sizes)
    assert host_memory._page_locked_bytes(plan) > sum(sizes)


def test_smaller_state_is_a_remedy_where_nothing_else_is(
    draft: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]], target: Target
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    shape = settings_of("qwen3", hidden_size=256, intermediate_size=16384, num_hidden_layers=6)
    heavy = {"settings": shape, "optimizer": "adamw"}
    smallest = {"max_seq_length": 16, "micro_batch_size": 1, "eval_batch_size": 1, "gradient_checkpointing": True}
    needed = forecast(draft(**heavy, **smallest), target).forecast.memory
    small = forecast(draft(**heavy | {"optimizer": "adamw_8bit"}, **smallest), target).forecast.memory
    paged = forecast(draft(**heavy | {"optimizer": "paged_adamw"}, **smallest), target).forecast.memory
    assert small.breakdown["optimizer"] < 0.3 * needed.breakdown["optimizer"]
    moved = needed.breakdown["optimizer"] - paged.breakdown["optimizer"]
    assert paged.host_peak_bytes == needed.host_peak_bytes + moved
    assert moved > 0.9 * needed.breakdown["optimizer"]
    given = recipe_of(per_device_train_batch_size=1, gradient_checkpointing=True, optim="adamw")
    limits = [(needed.peak_bytes + small.peak_bytes) / 2 / MIB]
    # And where weights and state by themselves are too much.
    limits.append((needed.breakdown["weights"] + needed.breakdown["optimizer"]) / MIB - 1)
    for limit in limits:
        with pytest.raises(DoesNotFitError, match=r"What would:\n  --optim adamw_8bit: .* MiB"):
            fit_plan(draft(limit, **heavy, **smallest), given, target)
    with pytest.raises(DoesNotFitError, match=r"\n  --memory_limit_gb \d\.\d: ") as caught:
        fit_plan(draft(small.peak_bytes / MIB - 1, **heavy, **smallest), given, target)
    assert "--optim" not in str(caught.value)


def test_alternatives_change_one_thing_each(draft: Callable[..., Plan], target: Target) -> None:
    rows = list(list_alternatives(draft(micro_batch_size=4), target))
    assert [list(row.settings) for row in rows] == [
        [],
        ["micro_batch_size", "total_batch_size"],
        ["micro_batch_size", "total_batch_size"],
        ["micro_batch_size", "total_batch_size"],
        ["gradient_checkpointing"],
        ["gradient_checkpointing"],
        ["torch_compile"],
        ["optimizer"],
        ["optimizer"],
        ["max_seq_length", "total_batch_size"],
    ]
    assert [row.settings["total_batch_size"] for row in rows if "total_batch_size" in row.settings] == [8, 8, 8, 16]
    assert [row.settings["optimizer"] for row in rows[7:9]] == ["adamw", "adamw_8bit"]
    assert rows[0].is_chosen
    by_size = {row.settings.get("micro_batch_size", 4): row.peak_bytes for row in rows[:4]}
    assert by_size[1] < by_size[2] < by_size[4] < by_size[8]
    by_share = {row.settings["gradient_checkpointing"]: row for row in rows[4:6]}
    assert by_share[True].peak_bytes < by_share[0.5].peak_bytes < rows[0].peak_bytes
    assert by_share[True].step_s > by_share[0.5].step_s > rows[0].step_s


@pytest.fixture
def wide_draft(draft: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]]) -> Callable[..., Plan]:
    """A plan whose logits outweigh all else; chunks of 1,024 tokens, of which a micro-batch has four times as many."""

    def make(limit: float | None = None, **changes: Any) -> Plan:
        settings = settings_of("qwen3", vocab_size=32768)
        return draft(limit, **{"settings": settings, "eval_batch_size": 1, "loss_chunk_size": 1024} | changes)

    return make


def test_all_logits_at_once_take_what_arithmetic_says(wide_draft: Callable[..., Plan], target: Target) -> None:
    chunked, full = (forecast(wide_draft(loss_chunk_size=size), target).forecast.memory for size in (1024, "full"))
    assert (chunked.peak_phase, full.peak_phase) == ("loss", "loss")
    # bf16 logits and their fp32 copy, of 3,072 tokens more.
    assert full.allocated_bytes - chunked.allocated_bytes == pytest.approx(6 * 3072 * 32768, rel=0.01)
    assert full.peak_bytes - chunked.peak_bytes == pytest.approx(6 * 3072 * 32768, rel=0.05)


def test_the_other_loss_is_an_alternative_and_a_remedy(wide_draft: Callable[..., Plan], target: Target) -> None:
    def losses(plan: Plan) -> list[int | str]:
        return [
            row.settings["loss_chunk_size"] for row in list_alternatives(plan, target) if "loss" in str(row.settings)
        ]

    assert losses(wide_draft()) == ["full"]
    assert losses(wide_draft(loss_chunk_size="full")) == [1024]
    assert losses(wide_draft(micro_batch_size=2)) == []
    sizes = {size: forecast(wide_draft(loss_chunk_size=size), target).forecast.memory for size in (1024, "full")}
    limit = (sizes[1024].peak_bytes + sizes["full"].peak_bytes) / 2 / MIB
    given = recipe_of(per_device_train_batch_size=8, gradient_checkpointing=True, loss_chunk_size="full")
    plan = wide_draft(limit, loss_chunk_size="full", gradient_checkpointing=True)
    with pytest.raises(DoesNotFitError, match=r"What would:\n  --loss_chunk_size 1024: "):
        fit_plan(plan, given, target)


def test_a_loss_that_may_change_is_cut_where_nothing_else_helps(
    wide_draft: Callable[..., Plan], target: Target
) -> None:
    small = {"micro_batch_size": 1, "total_batch_size": 1, "max_seq_length": 4096, "gradient_checkpointing": True}
    limit = forecast(wide_draft(**small), target).forecast.memory.peak_bytes / MIB / 0.9
    given = recipe_of(per_device_train_batch_size=1, loss_chunk_size="full", fit="auto")
    plan = fit_plan(wide_draft(limit, loss_chunk_size="full", **small), given, target)
    assert plan.loss_chunk_size == 1024
    assert "do not fit" in plan.reasons["loss_chunk_size"]
    assert plan.forecast is not None
    assert plan.forecast.memory.fits


def test_no_more_layers_recompute_than_have_to(
    draft: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]], target: Target
) -> None:
    deep = {"settings": settings_of("llama", num_hidden_layers=8, hidden_size=256, intermediate_size=512)}
    given = recipe_of(per_device_train_batch_size=8)

    def needed(share: float) -> float:
        return forecast(draft(gradient_checkpointing=share, **deep), target).forecast.memory.peak_bytes / MIB

    plans = [fit_plan(draft(needed(share) / 0.96, **deep), given, target) for share in (False, 0.25, 0.5, 0.75, True)]
    assert [plan.gradient_checkpointing for plan in plans] == [False, 0.25, 0.5, 0.75, True]
    steps = [plan.forecast.time.step_s for plan in plans]
    assert steps == sorted(set(steps))
    assert "the fewest layers that have to recompute" in plans[1].reasons["gradient_checkpointing"]
    # What fits by a hair is no reason to refuse, where nothing needs less.
    assert fit_plan(draft(needed(True) / 0.999, **deep), given, target).gradient_checkpointing is True
    # Compiled models this deep are known from shallow ones, whose layers are alike.
    deep["settings"] = settings_of("llama", num_hidden_layers=13)
    first = FirstAnswer(lambda _: None, is_refined=False)
    limit = 1.1 * needed(True)
    assert fit_plan(draft(limit, torch_compile=True, **deep), given, target, first).gradient_checkpointing is True


@pytest.fixture
def only_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alternatives without those that change settings."""
    monkeypatch.setattr("onecard.planner.ladder.changes_of", lambda *_: iter(()))


@pytest.mark.usefixtures("only_methods")
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_other_methods_are_alternatives_for_existing_models(
    method: str, draft: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]], target: Target
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = {"base": BasePlan(name="existing"), "init": "pretrained", "settings": settings_of("llama", **WIDE)}
    adapt = None if method == "full" else AdaptPlan(method=method, r=8)
    plan = draft(optimizer="adamw", adapt=adapt, micro_batch_size=2, max_seq_length=32, **base)
    rows = [row for row in list_alternatives(plan, target) if "method" in row.settings]
    assert [row.settings for row in rows] == [
        {"method": other} for other in ("full", "lora", "qlora") if other != method
    ]
    peaks = {row.settings["method"]: row.peak_bytes for row in rows} | {
        method: forecast(plan, target).forecast.memory.peak_bytes
    }
    assert peaks["qlora"] < peaks["lora"] < peaks["full"]
    assert not [row for row in list_alternatives(draft(optimizer="adamw"), target) if "method" in row.settings]


@pytest.mark.usefixtures("only_methods")
def test_adapters_too_wide_for_a_model_are_no_alternative(
    draft: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]], target: Target
) -> None:
    narrow = settings_of("llama", hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8)
    plan = draft(base=BasePlan(name="existing"), init="pretrained", settings=narrow, max_seq_length=16)
    assert [row.settings for row in list_alternatives(plan, target)] == [{}]


def test_adapters_are_a_remedy_where_all_weights_do_not_fit(
    draft: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]], target: Target
) -> None:
    base = {"base": BasePlan(name="existing"), "init": "pretrained", "settings": settings_of("llama", **WIDE)}
    plan = draft(optimizer="adamw", micro_batch_size=1, max_seq_length=32, gradient_checkpointing=True, **base)
    full = forecast(plan, target).forecast.memory.peak_bytes
    lora = forecast(plan.model_copy(update={"adapt": AdaptPlan(method="lora")}), target).forecast.memory.peak_bytes
    given = recipe_of(per_device_train_batch_size=1, gradient_checkpointing=True)
    capped = plan.model_copy(update={"memory_limit_bytes": (lora + min(full, 2 * lora)) // 2})
    with pytest.raises(DoesNotFitError, match=r"\n  --method lora: .* MiB, .* s a step") as caught:
        fit_plan(capped, given, target)
    (row,) = (row for row in caught.value.plan.alternatives if "method" in row.settings)
    assert row.fits
    scratch = capped.model_copy(update={"model": plan.model.model_copy(update={"base": None, "init": "transformers"})})
    with pytest.raises(DoesNotFitError) as caught:
        fit_plan(scratch, given, target)
    assert "--method" not in str(caught.value)


def test_the_users_allocator_settings_are_modelled(
    draft: Callable[..., Plan], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = draft(max_seq_length=400)
    plain = forecast(plan, target).forecast.memory
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "roundup_power2_divisions:2")
    rounded = forecast(plan, target).forecast.memory
    assert rounded.allocated_bytes > plain.allocated_bytes


def test_cudas_own_pool_is_planned_with_a_wider_band(
    draft: Callable[..., Plan], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = forecast(draft(), target).forecast.memory
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    pool = forecast(draft(), target).forecast.memory
    assert "closed to simulation" in pool.note
    assert plain.note is None
    # Neither below what tensors take nor, but for a page, far from PyTorch's own allocator.
    assert pool.allocated_bytes <= pool.peak_bytes == pytest.approx(plain.peak_bytes, abs=32 * MIB)
    assert pool.peak_low_bytes < pool.allocated_bytes
    assert pool.peak_high_bytes / pool.peak_bytes > 1.1 + plain.peak_high_bytes / plain.peak_bytes - 1


def test_old_segments_are_given_back_where_the_user_asks_for_it(
    draft: Callable[..., Plan], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow, caps = TracedPlan.replay, list[int | None]()

    def watch(self: TracedPlan, workspace_bytes: int, settings: Any, cap_bytes: int | None = None) -> Any:
        caps.append(cap_bytes)
        peak = follow(self, workspace_bytes, settings, cap_bytes)
        return peak if cap_bytes is None else replace(peak, reserved_bytes=peak.reserved_bytes - MIB)

    monkeypatch.setattr(TracedPlan, "replay", watch)
    plain = forecast(draft(), target).forecast.memory
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "garbage_collection_threshold:0.8")
    collected = forecast(draft(), target).forecast.memory
    # How much is collected depends on what there is.
    assert caps == [None, None, target.limit_bytes]
    assert collected.peak_bytes == plain.peak_bytes - MIB
