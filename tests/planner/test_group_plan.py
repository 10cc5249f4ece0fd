"""Plans for several cards: what each holds, what they tell one another, and which way they share a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import DoesNotFitError, InputError
from onecard.hardware import find_card, probe_machine
from onecard.model.build import count_parameters
from onecard.planner.communication import NCCL_BYTES, find_fabric
from onecard.planner.device import Target, keep_for_nccl, target_of_card
from onecard.planner.efficiency import default_efficiencies
from onecard.planner.forecast import forecast
from onecard.planner.host_memory import check_host, checkpoint_bytes, host_memory
from onecard.planner.ladder import list_alternatives
from onecard.planner.parts import find_parts, share_of
from onecard.planner.ranks import plan_for_ranks, share_out
from onecard.planner.roofline import predict_time
from onecard.planner.strategy import fit_ranks
from onecard.spec import CardGroup, Forecast, Plan, Recipe

MIB = 2**20
# Weights that outweigh activations.
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
CARD = find_card("rtx-4090")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Traces of one test serve the others.
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path_factory.getbasetemp() / "traces-of-groups"))
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "home"))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def draft(tiny_plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """A wide model on a card, one row a micro-batch."""
    settings = tiny_plan("qwen3").model.settings | WIDE
    total, matrices = count_parameters(settings)

    def make(**changes: Any) -> Plan:
        values = {"max_seq_length": 64, "micro_batch_size": 1, "total_batch_size": 64, "eval_batch_size": 1} | changes
        limit = values.pop("limit_bytes", 2**33)
        plan = tiny_plan(settings=settings, device="cuda:0", memory_limit_bytes=limit, optimizer="adamw", **values)
        model = plan.model.model_copy(update={"num_parameters": total, "num_matrix_parameters": matrices})
        return plan.model_copy(update={"model": model, "flops_per_token": 6.0 * matrices})

    return make


def group_of(num: int, **joined: Any) -> Target:
    return target_of_card(CARD, "linux", CardGroup(num=num, **joined))


def told(plan: Plan, target: Target) -> Forecast:
    return forecast(plan, target).forecast


def state_at(num: int, plan: Plan) -> dict[str, int]:
    return told(plan, group_of(num)).memory.breakdown


def test_one_process_is_planned_as_ever(draft: Callable[..., Plan]) -> None:
    plan, alone = draft(micro_batch_size=8), target_of_card(CARD, "linux")
    outlook = forecast(plan, alone)
    assert outlook.forecast.time is not None
    assert outlook.forecast.time.step_s == predict_time(outlook.trace, plan, CARD, default_efficiencies(CARD)).step_s
    assert outlook.forecast.time.communication_s is None
    assert told(plan, group_of(1)).model_copy(update={"group": None}) == outlook.forecast
    assert keep_for_nccl(alone) is alone


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_whole_state_is_that_of_one_card_and_the_buckets(draft: Callable[..., Plan], precision: str) -> None:
    plan = draft(precision=precision, micro_batch_size=4)
    memories = {num: told(plan, group_of(num)).memory for num in (8, 16)}
    found = {num: memory.peak_bytes for num, memory in memories.items()}
    share = share_of(plan, 16)
    alone = told(share, target_of_card(CARD, "linux")).memory
    gradients = 4 * plan.model.num_parameters
    if precision == "bf16":
        # Buckets of 16 bits lie beside the masters' gradients, in all phases.
        more = {phase: memories[16].phase_bytes[phase] - alone.phase_bytes[phase] for phase in ("forward", "backward")}
        assert more["forward"] == pytest.approx(gradients / 2, rel=0.05)
        assert gradients / 2.1 <= more["backward"] <= gradients
    else:
        assert alone.allocated_bytes <= memories[16].allocated_bytes <= alone.allocated_bytes + 1.01 * gradients
        # They stay during the forward pass.
        forward = memories[16].phase_bytes["forward"]
        assert forward - alone.phase_bytes["forward"] == pytest.approx(gradients, rel=0.05)
    # However many share the step, each has micro-batches of the same size; several of them add to gradients.
    assert found[16] <= found[8] <= 1.1 * found[16]


def test_parts_get_smaller_towards_what_is_gathered_and_activations(draft: Callable[..., Plan]) -> None:
    peaks, states = [], []
    for num in (2, 4, 8, 16, 64):
        plan = draft(strategy="fsdp", total_batch_size=num)
        memory = told(plan, group_of(num)).memory
        peaks.append(memory.peak_bytes)
        states.append(memory.breakdown["weights"] + memory.breakdown["optimizer"])
    assert peaks == sorted(peaks, reverse=True)
    assert states[0] == pytest.approx(32 * states[-1], rel=0.02)
    # What is left is there however many there are.
    plan = draft(strategy="fsdp", total_batch_size=1024)
    least = told(plan, group_of(1024)).memory
    parts = find_parts(plan.model)
    assert least.breakdown["gathered"] >= 4 * (parts.root + parts.largest_layer)
    rest = sum(least.breakdown[name] for name in ("gathered", "activations", "gradients"))
    assert rest > 0.8 * (least.allocated_bytes - least.breakdown["workspaces"])
    whole = told(plan.model_copy(update={"strategy": "ddp"}), group_of(1024)).memory
    assert least.peak_bytes < whole.peak_bytes


def test_gradients_are_cut_in_every_micro_batch(draft: Callable[..., Plan]) -> None:
    one, two = (
        told(draft(strategy="fsdp", total_batch_size=total), group_of(16)).memory.phase_bytes["backward"]
        for total in (16, 32)
    )
    assert two < one + 4 * find_parts(draft().model).total // 4


def test_parts_of_a_model_are_all_of_it(draft: Callable[..., Plan]) -> None:
    parts = find_parts(draft().model)
    assert len(parts.layers) == WIDE["num_hidden_layers"]
    assert parts.total == draft().model.num_parameters


def test_the_rank_with_the_most_to_do_is_planned(draft: Callable[..., Plan]) -> None:
    for total, size, num, most in ((10, 4, 2, 6), (8, 1, 3, 3), (8, 2, 4, 2), (64, 4, 1, 64)):
        plan = draft(total_batch_size=total, micro_batch_size=size)
        assert share_of(plan, num).total_batch_size == most


def test_rings_take_longer_with_more_cards_up_to_a_bound_and_less_with_faster_links() -> None:
    num_bytes = 10**9

    def sum_s(num: int, **joined: Any) -> float:
        joined = {"per_machine": 1024, "link_bytes_per_s": 10e9} | joined
        return find_fabric(CardGroup(num=num, **joined), CARD).sum_s(num_bytes)

    times = [sum_s(num) for num in (1, 2, 4, 8, 64, 1024)]
    assert times[0] == 0.0
    assert times == sorted(times)
    assert sum_s(2) == pytest.approx(num_bytes / 10e9, rel=0.01)
    hops_s = 2 * 1023 * 6e-6
    assert sum_s(1024) < 2 * num_bytes / 10e9 + hops_s
    assert sum_s(8, link_bytes_per_s=100e9) < 0.2 * sum_s(8)
    fabric = find_fabric(CardGroup(num=8, link_bytes_per_s=10e9), CARD)
    assert fabric.gather_s(num_bytes) == pytest.approx(fabric.sum_s(num_bytes) / 2, rel=0.01)
    # Beyond a machine the network decides, where it is the slower one.
    assert sum_s(16, per_machine=8, network_bytes_per_s=1e9) > 5 * sum_s(16)
    assert sum_s(16, per_machine=8, network_bytes_per_s=100e9) == pytest.approx(sum_s(16), rel=0.01)


def test_what_is_not_known_of_links_is_said_and_widens_the_band(draft: Callable[..., Plan]) -> None:
    plan = draft(precision="bf16")
    known = {"per_machine": 8, "link_bytes_per_s": 15.4e9, "network_bytes_per_s": 25e9}
    wide, narrow = (told(plan, group_of(16, **joined)).time for joined in ({}, known))
    assert wide is not None
    assert narrow is not None
    for flag in ("--link_gb_per_s", "--network_gb_per_s", "--cards_per_machine"):
        assert flag in (wide.note or "")
        assert flag not in (narrow.note or "")
    assert wide.step_high_s - wide.step_low_s > narrow.step_high_s - narrow.step_low_s
    for note in (wide.note, narrow.note):
        assert "no run on several GPUs was measured" in (note or "")
    # NVLink joins all of a machine; a card without a slot is not taken for one with the best.
    assert "NVLink" in find_fabric(CardGroup(num=8), find_card("h100-sxm")).remarks[0]
    assert "not known" in find_fabric(CardGroup(num=2), replace(CARD, pcie=None)).remarks[0]


@pytest.mark.parametrize(
    ("strategy", "precision"), [("ddp", "bf16"), ("ddp", "fp32"), ("fsdp", "fp32"), ("fsdp", "bf16")]
)
def test_cards_wait_for_what_computing_does_not_hide(draft: Callable[..., Plan], strategy: str, precision: str) -> None:
    plan = draft(strategy=strategy, precision=precision, micro_batch_size=4)
    slow, fast = (told(plan, group_of(4, link_bytes_per_s=rate)).time for rate in (1e8, 3e11))
    assert slow is not None
    assert fast is not None
    for time in (slow, fast):
        assert 0 < time.exposed_communication_s <= time.communication_s
        assert time.step_low_s <= time.step_s <= time.step_high_s
        assert 0 < time.efficiency <= 1
        assert time.tokens_per_s == pytest.approx(plan.tokens_per_step / time.step_s)
    assert slow.limited_by == "communication" != fast.limited_by
    assert slow.step_s > fast.step_s
    assert fast.exposed_communication_s < fast.communication_s
    # More cards are faster, and never by more than their number.
    times = [told(plan, group_of(num, link_bytes_per_s=3e11)).time.step_s for num in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[-1] < 8


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_share_the_batches_of_an_evaluation(draft: Callable[..., Plan], strategy: str) -> None:
    plan = draft(strategy=strategy, eval_batches=10)
    plan = plan.model_copy(update={"corpus": plan.corpus.model_copy(update={"num_heldout_tokens": 64 * 10})})
    alone, four = (told(plan, group_of(num)).time.evaluation_s for num in (1, 4))
    assert four == pytest.approx(alone * 3 / 10)


def fitted(plan: Plan, target: Target, **changes: Any) -> Plan:
    return fit_ranks(plan, Recipe(dataset="x", **changes), target, None)


def test_whole_state_where_it_fits_else_parts_with_the_reason(draft: Callable[..., Plan]) -> None:
    whole = fitted(draft(precision="bf16"), group_of(8))
    assert whole.strategy == "ddp"
    assert "whole state" in whole.reasons["strategy"]
    state_bytes = 16 * whole.model.num_parameters
    tight = draft(precision="bf16", limit_bytes=int(0.8 * state_bytes), total_batch_size=16)
    target = replace(group_of(16), limit_bytes=tight.memory_limit_bytes)
    parts = fitted(tight, target)
    assert (parts.strategy, parts.precision) == ("fsdp", "bf16")
    assert parts.reasons["strategy"].startswith("each card holds a part")
    assert parts.forecast is not None
    assert parts.forecast.memory.peak_bytes <= tight.memory_limit_bytes
    # The step stays what it was.
    assert parts.total_batch_size == 16
    # Given by hand it is binding, and the other one is named with its figures.
    with pytest.raises(DoesNotFitError, match="--strategy fsdp"):
        fitted(tight, target, strategy="ddp")
    # Neither: exit code 3, and which of the two was tried.
    hopeless = tight.model_copy(update={"memory_limit_bytes": 20 * MIB})
    with pytest.raises(DoesNotFitError, match="strategy fsdp; with ddp"):
        fitted(hopeless, replace(target, limit_bytes=20 * MIB))
    # What was given stands against parts.
    in_blocks = tight.model_copy(update={"optimizer": tight.optimizer.model_copy(update={"name": "adamw_8bit"})})
    with pytest.raises(DoesNotFitError, match="In parts it cannot be held: strategy fsdp does not go with"):
        fitted(in_blocks, target)


def test_more_cards_are_offered_where_parts_do_not_fit(draft: Callable[..., Plan]) -> None:
    state_bytes = 16 * draft().model.num_parameters
    tight = draft(strategy="fsdp", limit_bytes=int(0.95 * state_bytes), total_batch_size=64, micro_batch_size=32)
    with pytest.raises(DoesNotFitError) as refused:
        fitted(
            tight,
            replace(group_of(2), limit_bytes=tight.memory_limit_bytes),
            strategy="fsdp",
            per_device_train_batch_size=32,
            gradient_checkpointing=False,
        )
    (more,) = (row for row in refused.value.plan.alternatives if "num_processes" in row.settings)
    assert more.settings["num_processes"] in (4, 8, 16)
    assert more.fits
    assert "--num_processes" in str(refused.value)


def test_the_ladder_shows_both_strategies(draft: Callable[..., Plan]) -> None:
    plan = fitted(draft(precision="bf16", total_batch_size=8), group_of(4))
    rows = {row.settings.get("strategy"): row for row in list_alternatives(plan, group_of(4))}
    assert rows["fsdp"].settings == {"strategy": "fsdp"}
    sharded = plan.model_copy(update={"strategy": "fsdp", "forecast": None})
    assert "ddp" in {row.settings.get("strategy") for row in list_alternatives(sharded, group_of(4))}
    alone = [row.settings for row in list_alternatives(plan, target_of_card(CARD, "linux"))]
    assert not any("strategy" in settings for settings in alone)


def test_the_batch_does_not_depend_on_the_number_of_cards(draft: Callable[..., Plan]) -> None:
    for num in (2, 3, 5, 8):
        plan = fitted(draft(precision="bf16", total_batch_size=24), group_of(num))
        assert plan.total_batch_size == 24
        # Each has as many micro-batches as any other, or one fewer.
        assert plan.num_micro_batches % num == 0 or plan.micro_batch_size * num >= 24 // plan.num_micro_batches


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_host_is_planned_by_process_and_by_machine(draft: Callable[..., Plan], optimizer: str) -> None:
    plan = draft(strategy="fsdp")
    plan = plan.model_copy(update={"optimizer": plan.optimizer.model_copy(update={"name": optimizer})})
    whole = checkpoint_bytes(plan)
    for joined, num_local in (({"per_machine": 4}, 4), ({"per_machine": 1}, 1), ({}, 8)):
        found = host_memory(plan, group_of(16, **joined).group)
        # Nobody but the leader has the state whole, however many there are.
        assert found.leader - found.other == whole
        assert found.machine == num_local * found.other + whole
    ddp = host_memory(plan.model_copy(update={"strategy": "ddp"}), group_of(16).group)
    assert ddp.other - found.other >= 4 * plan.model.num_parameters
    memory = told(plan, group_of(16, per_machine=4)).memory
    assert memory.host_machine_bytes == memory.host_peak_bytes + 3 * memory.host_other_bytes
    assert told(draft(), target_of_card(CARD, "linux")).memory.host_machine_bytes is None


def test_a_host_without_room_for_its_processes_is_refused(draft: Callable[..., Plan]) -> None:
    for strategy, what, remedy in (
        ("fsdp", "for the whole state at each checkpoint", "or use --optim muon"),
        ("ddp", "each builds the whole model", "or set --strategy fsdp"),
    ):
        plan, group = draft(strategy=strategy), group_of(8).group
        needed = host_memory(plan, group, has_copy=False)
        # This process is there already.
        enough = needed.machine - host_memory(draft(strategy="fsdp"), group).other
        check_host(plan, replace(probe_machine(), free_ram_bytes=enough), group)
        with pytest.raises(DoesNotFitError, match=f"its 8 processes need .*{what}.*{remedy}") as refused:
            check_host(plan, replace(probe_machine(), free_ram_bytes=enough - 1), group)
        assert refused.value.exit_code == 3


def test_room_is_kept_for_nccl() -> None:
    target = group_of(2)
    assert target.limit_bytes - keep_for_nccl(target).limit_bytes == NCCL_BYTES


@pytest.mark.parametrize(
    ("packing", "num_ranks", "size"), [("off", 2, 4), ("off", 3, 3), ("off", 8, 1), ("rows", 4, 2)]
)
def test_a_micro_batch_that_leaves_ranks_without_one_is_cut(
    draft: Callable[..., Plan], packing: str, num_ranks: int, size: int
) -> None:
    corpus = draft().corpus.model_copy(update={"num_train_rows": 100, "num_train_tokens": 3200})
    # Packed, 8 chats of 32 tokens fill 5 rows of 64.
    given = draft(micro_batch_size=4, total_batch_size=8, packing=packing, corpus=corpus)
    recipe = Recipe(dataset="texts", per_device_train_batch_size=4)
    new, again = plan_for_ranks(given, recipe, num_ranks), share_out(given, recipe, num_ranks)
    assert new == again
    assert (new.micro_batch_size, new.total_batch_size) == (size, 8)
    reason = f"{size} sequences at once, not 4: {num_ranks} processes share a step of 8 samples"
    assert new.reasons.get("micro_batch_size.asked") == (reason if size < 4 else None)
    # On fewer processes it is as it was cut.
    assert share_out(new, recipe, 1) == new
    with pytest.raises(InputError, match="9 processes are more than the 8 samples of a step: start at most 8"):
        share_out(given, recipe, 9)
