"""`onecard plan --num_processes`: several cards, of one kind or side by side."""

import json

import pytest
from cli.conftest import SMALL_PLAN

from onecard.cli.group_words import take_group
from onecard.errors import InputError

pytestmark = pytest.mark.usefixtures("small_text")

WORDS = (*SMALL_PLAN, "--no-refine")


def test_one_process_changes_nothing(run) -> None:
    card = ("--card", "rtx-3060-12gb", "--json")
    alone, one = (json.loads(run(*WORDS, *card, *more).stdout) for more in ((), ("--num_processes", "1")))
    assert one == alone
    assert (alone["num_ranks"], alone["strategy"], alone["communication_s"]) == (1, None, None)


def test_several_cards_tell_what_each_holds_and_what_they_lose(run) -> None:
    words = (*WORDS, "--card", "rtx-3060-12gb", "--num-processes=4", "--link_gb_per_s", "12.5")
    done = run(*words, "--json")
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["num_ranks"], document["strategy"], document["settings"]["total_batch_size"]) == (4, "ddp", 8)
    assert 0 < document["exposed_communication_s"] <= document["communication_s"] < document["step_s"]
    assert 0 < document["efficiency"] <= 1
    assert "12.5 GB/s between cards" in document["time_note"]
    assert "strategy" in document["choices"]
    assert {"strategy": "fsdp"} in [row["settings"] for row in document["alternatives"]]
    told = run(*words).stdout
    assert told.startswith("device      4 x RTX 3060 12GB (cuda:0), bf16, not compiled, ddp")
    assert " of 4 times one card's speed with such micro-batches; communication " in told
    assert " of RAM in the first process and " in told
    hosts = [document[f"host_{name}_bytes"] for name in ("machine", "peak", "other")]
    assert hosts[0] == hosts[1] + 3 * hosts[2]
    # The strategy is one of the recipe's keys.
    parts = json.loads(run(*words, "--strategy", "fsdp", "--json").stdout)
    assert parts["strategy"] == "fsdp"
    assert parts["host_other_bytes"] < document["host_other_bytes"]
    assert parts["breakdown"]["gathered"] > 0


def test_groups_stand_side_by_side(run) -> None:
    words = (*WORDS, "--card", "rtx-3060-12gb,rtx-4090", "--num_processes", "2")
    done = run(*words)
    assert done.code == 0, done.stderr
    assert "2 x RTX 3060 12GB" in done.stdout
    assert "2 x RTX 4090" in done.stdout
    assert ", ddp" in done.stdout
    cards = json.loads(run(*words, "--json").stdout)["cards"]
    assert [card["num_ranks"] for card in cards] == [2, 2]


def test_processes_of_this_machine_share_its_memory(run) -> None:
    pretrain = (*WORDS[:-1], "--device", "cpu", "--torch_compile", "false", "--json")
    alone, two = (json.loads(run(*pretrain, *more).stdout) for more in ((), ("--num_processes", "2")))
    assert two["num_ranks"] == 2
    others = two["host_machine_bytes"] - two["host_peak_bytes"]
    assert others == two["host_other_bytes"] > 0.9 * alone["peak_bytes"]
    assert two["limit_bytes"] == pytest.approx(alone["limit_bytes"] - others, rel=0.1)
    assert two["communication_s"] is None
    assert "gloo" in two["time_note"]


def test_a_micro_batch_too_large_to_be_shared_is_cut_and_told(run) -> None:
    done = run(*WORDS, "--card", "rtx-3060-12gb", "--per_device_train_batch_size", "8", "--num_processes", "3")
    assert done.code == 0, done.stderr
    assert "in 3 micro-batches of 3" in done.stdout
    assert "3 sequences at once, not 8: 3 processes share a step of 8 samples" in done.stdout


def test_more_processes_than_samples_are_refused(run) -> None:
    done = run(*WORDS, "--card", "rtx-3060-12gb", "--num_processes", "9")
    assert done.code == 2
    assert "9 processes are more than the 8 samples of a step" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num_processes", "0"], "--num_processes 0: give a whole number"),
        (["--num_processes", "2.5"], "--num_processes 2.5: give a whole number"),
        (["--num_processes"], "--num_processes without a value"),
        (["--num_processes", "2", "--num-processes", "3"], "given twice, as 2 and as 3"),
        (["--link_gb_per_s", "20"], "add --num_processes N"),
        (["--num_processes", "2", "--link_gb_per_s", "fast"], "--link_gb_per_s fast: give GB/s"),
        (["--num_processes", "2", "--network_gb_per_s=-1"], "--network_gb_per_s -1: give GB/s"),
        (["--num_processes", "nan"], "--num_processes nan: give"),
    ],
)
def test_a_group_that_cannot_be_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        take_group(words)


def test_all_that_is_wrong_is_told_together() -> None:
    with pytest.raises(InputError) as refused:
        take_group(["--num_processes", "x", "--link_gb_per_s", "0"])
    assert len(str(refused.value).splitlines()) == 2


def test_other_words_stay() -> None:
    rest, group = take_group(["demo", "--num_processes", "2", "--cards_per_machine=1", "--optim", "muon"])
    assert rest == ["demo", "--optim", "muon"]
    assert (group.num, group.per_machine, group.link_bytes_per_s) == (2, 1, None)
    assert take_group(["demo", "--num_processes", "1"]) == (["demo"], None)
