"""onecard against TRL's SFTTrainer on a CPU: the same losses, and target tokens/s and memory side by side.

    python benchmarks/against_trl.py parity
    python benchmarks/against_trl.py speed --shape 11M --rounds 5

Both sides get the same weights and the same conversations as ids and targets, so that templates and masks have no part
in it. `parity` compares the loss of 50 steps, fp32, not packed, for all weights and for LoRA (from the same A). `speed`
runs the sides in turn, round by round, and takes medians of ratios; memory is the peak of what PyTorch allocates in a
step less 16 bytes a parameter (fp32 weights, gradients and two moments), the same for both, so that onecard's 16-bit
copy counts against it. TRL's settings lie in trl_settings.yaml. Needs `pip install onecard[bench]`.

Where the two differ, and how that is met here: TRL's rate in a warmup of n steps begins at 0 and onecard's at 1/n (no
warmup); TRL's `labels` are shifted by the model and onecard's targets are shifted already. Both divide the sum over
targets by their number in the whole step.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from record import earlier_result, write_result

from onecard.data import Batch, train_tokenizer
from onecard.model.folder import save_model_folder
from onecard.spec import AdaptPlan, CorpusFacts, ModelPlan, OptimizerPlan, Plan, SchedulePlan
from onecard.training.assemble import assemble
from onecard.training.schedule import rate_at
from onecard.training.state import TrainState
from onecard.training.step import place, train_step

SETTINGS = yaml.safe_load((Path(__file__).parent / "trl_settings.yaml").read_text(encoding="utf-8"))
_LLAMA = {"model_type": "llama", "max_position_embeddings": 2048, "tie_word_embeddings": True}
_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 512} | _IDS
TINY: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | _TINY | {"num_key_value_heads": 2, "intermediate_size": 176},
    "gpt2": {"model_type": "gpt2", "n_positions": 2048} | _TINY,
}
SHAPES: dict[str, dict[str, Any]] = {
    "11M": _LLAMA
    | _IDS
    | {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6}
    | {"intermediate_size": 1024, "vocab_size": 4096},
    "135M": _LLAMA
    | _IDS
    | {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"intermediate_size": 1536, "vocab_size": 49152},
}
MAX_LENGTH = 1024
NO_TARGET = -100


@dataclass(frozen=True)
class Chat:
    """Ids of a conversation and, for each, whether it is to be learnt."""

    ids: np.ndarray
    is_target: np.ndarray


@dataclass(frozen=True)
class Case:
    """One way of running either side."""

    settings: dict[str, Any]
    chats: list[Chat]
    num_steps: int
    precision: str = "fp32"
    is_packed: bool = False
    has_lora: bool = False
    is_parity: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return SETTINGS["parity"] if self.is_parity else SETTINGS["speed"]

    @property
    def rows_per_batch(self) -> int:
        if self.is_parity:
            return int(SETTINGS["parity"]["per_device_train_batch_size"])
        return int(self.options["packed" if self.is_packed else "unpacked"]["per_device_train_batch_size"])


@dataclass(frozen=True)
class Run:
    """What a run showed: the loss of each step, when it ended, its targets, and bytes at the peak of the last step."""

    losses: list[float]
    ended_s: list[float]
    num_targets: list[int]
    start_up_s: float
    peak_bytes: int | None = None

    def targets_per_s(self, warmup: int) -> float:
        return sum(self.num_targets[warmup:]) / (self.ended_s[-1] - self.ended_s[warmup - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["parity", "speed"])
    parser.add_argument("--shape", choices=list(SHAPES), default="11M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round, after two that are not")
    arguments = parser.parse_args()
    result = earlier_result("against_trl")
    if arguments.what == "parity":
        result["parity"] = compare_losses()
    else:
        result[f"speed {arguments.shape}"] = compare_speed(arguments.shape, arguments.rounds, arguments.steps)
    write_result("against_trl", result)


def compare_losses() -> dict[str, Any]:
    """Largest difference of the loss over 50 steps, by architecture and method."""
    found: dict[str, Any] = {}
    for (name, settings), has_lora in ((item, flag) for item in TINY.items() for flag in (False, True)):
        options = SETTINGS["parity"]
        rows_per_step = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
        chats = make_chats(options["max_steps"] * rows_per_step, vocab_size=512, median_length=60)
        case = Case(settings, chats, options["max_steps"], has_lora=has_lora, is_parity=True)
        ours, theirs = run_side(run_onecard, case), run_side(run_trl, case)
        assert ours.num_targets == theirs.num_targets
        difference = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
        label = f"{name}, {'LoRA' if has_lora else 'full'}"
        found[label] = {"largest_difference": difference, "first": ours.losses[0], "last": ours.losses[-1]}
        print(f"{label}: loss {ours.losses[0]:.4f} -> {ours.losses[-1]:.4f}, at most {difference:.1e} apart")
    return found


def compare_speed(shape: str, num_rounds: int, num_steps: int) -> dict[str, Any]:
    """Target tokens/s, memory and start-up of each side and setting, and ratios by round."""
    settings = SHAPES[shape]
    warmup = 2
    base = Case(settings, [], warmup + num_steps)
    ways = {
        f"{precision}, {'packed' if is_packed else 'unpacked'}": replace(
            base, precision=precision, is_packed=is_packed, chats=_enough_chats(base, is_packed)
        )
        for precision in ("fp32", "bf16")
        for is_packed in (False, True)
    }
    sides: dict[str, Callable[[Case, Path], Run]] = {"onecard": run_onecard, "TRL": run_trl}
    speeds: dict[str, list[float]] = {f"{side}, {way}": [] for way in ways for side in sides}
    rest: dict[str, dict[str, float]] = {key: {} for key in speeds}
    for round_number in range(num_rounds):
        for way, case in ways.items():
            for side, run in sides.items():
                done, key = run_side(run, case), f"{side}, {way}"
                speeds[key].append(done.targets_per_s(warmup))
                rest[key] = {
                    "start_up_s": done.start_up_s,
                    "beyond_static_bytes": (done.peak_bytes or 0) - 16 * _num_parameters(settings),
                }
                print(f"round {round_number + 1}: {key}: {speeds[key][-1]:,.0f} target tokens/s, {rest[key]}")
    return _summarize(speeds, rest, list(ways))


def _summarize(speeds: dict[str, list[float]], rest: dict[str, dict[str, float]], ways: list[str]) -> dict[str, Any]:
    best = max((f"TRL, {way}" for way in ways), key=lambda key: statistics.median(speeds[key]))
    auto = "onecard, bf16, packed"
    pairs = {way: (f"onecard, {way}", f"TRL, {way}") for way in ways} | {f"auto against {best}": (auto, best)}
    ratios = {}
    for label, (ours, theirs) in pairs.items():
        rounds = [a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)]
        memory = rest[ours]["beyond_static_bytes"] / rest[theirs]["beyond_static_bytes"]
        ratios[label] = {"speed": statistics.median(rounds), "rounds": rounds, "memory_beyond_static": memory}
        print(f"{label}: {statistics.median(rounds):.2f} x the target tokens/s, {memory:.2f} x the memory")
    return {"target_tokens_per_s": speeds, "others": rest, "ratios": ratios}


def run_side(run: Callable[[Case, Path], Run], case: Case) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return run(case, Path(folder))


def run_onecard(case: Case, folder: Path) -> Run:
    """Trains with onecard's own step on batches made here."""
    started = time.perf_counter()
    state = assemble(make_plan(case))
    steps = list(onecard_steps(case))[: case.num_steps]
    losses, ended, counts = [], [], []
    start_up_s = time.perf_counter() - started
    for number, batches in enumerate(steps):
        losses.append(_update(state, batches, number))
        ended.append(time.perf_counter())
        counts.append(sum(batch.num_targets for batch in batches))
    if case.is_parity:
        return Run(losses, ended, counts, start_up_s)
    with Allocations() as allocations:
        _update(state, steps[-1], case.num_steps)
    return Run(losses, ended, counts, start_up_s, allocations.peak_bytes + _resident_bytes(state))


def _update(state: TrainState, batches: Sequence[Batch], number: int) -> float:
    rate = state.plan.optimizer.learning_rate * rate_at(state.plan.schedule, number)
    placed = [place(batch, state) for batch in batches]
    return float(train_step(state, placed, rate, max_grad_norm=state.plan.optimizer.max_grad_norm).loss)


def run_trl(case: Case, folder: Path) -> Run:
    """Trains with SFTTrainer from the same weights."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    state = assemble(make_plan(replace(case, precision="fp32", has_lora=False)))
    save_model_folder(state.model, state.optimizer.masters, folder / "model")
    del state
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = train_tokenizer("bytes", ())
    tokenizer.pad_token = tokenizer.eos_token
    losses: list[float] = []
    ended: list[float] = []
    counts: list[int] = []
    began: list[float] = []
    allocations = Allocations()

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began.append(time.perf_counter())
            counts.append(0)
            if len(began) > case.num_steps:
                allocations.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if len(began) > case.num_steps:
                allocations.__exit__()
            else:
                ended.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    class Counting(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
            counts[-1] += int((inputs["labels"][:, 1:] != NO_TARGET).sum())
            return super().compute_loss(model, inputs, *args, **keywords)

    rows = [
        {"input_ids": chat.ids.tolist(), "labels": np.where(chat.is_target, chat.ids, NO_TARGET).tolist()}
        for chat in case.chats
    ]
    trainer = Counting(
        model=model,
        args=SFTConfig(output_dir=str(folder / "out"), use_cpu=True, **_trl_options(case)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**case.options["lora"]) if case.has_lora else None,
        callbacks=[Watch()],
    )
    if case.has_lora:
        copy_adapters(assemble(make_plan(case)), trainer.model)
    trainer.train()
    if case.is_parity:
        return Run(losses, ended, counts, began[0] - started)
    moments = [tensor for state in trainer.optimizer.optimizer.state.values() for tensor in state.values()]
    peak = allocations.peak_bytes + _distinct_bytes([*model.parameters(), *moments])
    return Run(losses, ended, counts[: case.num_steps], began[0] - started, peak)


def _trl_options(case: Case) -> dict[str, Any]:
    options = {key: value for key, value in case.options.items() if key not in ("lora", "packed", "unpacked")}
    if not case.is_parity:
        options |= case.options["packed" if case.is_packed else "unpacked"]
        # One step more: its memory is watched, its time is not counted.
        options |= {"max_steps": case.num_steps + 1, "bf16": case.precision == "bf16"}
    return SETTINGS["every_run"] | options


def copy_adapters(state: TrainState, model: torch.nn.Module) -> None:
    """Gives PEFT's model the adapters that onecard starts from."""
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            if "lora_" in name:
                theirs[f"base_model.model.{name}"].copy_(parameter)


def onecard_steps(case: Case) -> Iterator[list[Batch]]:
    """The micro-batches of each step: padded rows, or chats back to back up to the length of TRL's packed rows."""
    per_step = SETTINGS["parity"]["gradient_accumulation_steps"] if case.is_parity else 1
    batches = []
    for chats in _grouped(case):
        batches.append(pack_chats(chats) if case.is_packed else pad_chats(chats))
        if len(batches) == per_step:
            yield batches
            batches = []


def _grouped(case: Case) -> Iterator[list[Chat]]:
    if not case.is_packed:
        for first in range(0, len(case.chats), case.rows_per_batch):
            yield case.chats[first : first + case.rows_per_batch]
        return
    group: list[Chat] = []
    for chat in case.chats:
        if sum(len(other.ids) for other in group) + len(chat.ids) > case.rows_per_batch * MAX_LENGTH:
            yield group
            group = []
        group.append(chat)


def pad_chats(chats: Sequence[Chat]) -> Batch:
    longest = max(len(chat.ids) for chat in chats)
    ids = np.zeros((len(chats), longest), dtype=np.int64)
    targets = np.full_like(ids, NO_TARGET)
    for row, chat in enumerate(chats):
        ids[row, : len(chat.ids)] = chat.ids
        targets[row, : len(chat.ids) - 1] = np.where(chat.is_target, chat.ids, NO_TARGET)[1:]
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), None, int((targets != NO_TARGET).sum()))


def pack_chats(chats: Sequence[Chat]) -> Batch:
    """One row, chats back to back; the last token of each has no target."""
    ids = np.concatenate([chat.ids for chat in chats])
    targets = np.concatenate(
        [np.append(np.where(chat.is_target, chat.ids, NO_TARGET)[1:], NO_TARGET) for chat in chats]
    )
    documents = np.repeat(np.arange(len(chats), dtype=np.int32), [len(chat.ids) for chat in chats])
    tensors = (torch.from_numpy(array)[None] for array in (ids, targets, documents))
    return Batch(*tensors, int((targets != NO_TARGET).sum()))


def make_chats(num_chats: int, *, vocab_size: int, median_length: int = 250) -> list[Chat]:
    """Random ids with lengths as chats have them (log-normal), answered in two rounds; six tokens of ten are answers.

    The next token is often the one after it in the vocabulary, so that there is something to learn.
    """
    generator = np.random.default_rng(0)
    chats = []
    for _ in range(num_chats):
        length = int(np.clip(np.exp(generator.normal(np.log(median_length), 0.75)), 16, MAX_LENGTH))
        steps = generator.choice([1, 2, 7], size=length, p=[0.7, 0.2, 0.1])
        ids = 1 + (generator.integers(vocab_size) + steps.cumsum()) % (vocab_size - 1)
        place = np.arange(length) / length % 0.5
        chats.append(Chat(ids.astype(np.int64), place >= 0.2))
    return chats


def _enough_chats(case: Case, is_packed: bool) -> list[Chat]:
    per_step = 2 * MAX_LENGTH // 150 if is_packed else SETTINGS["speed"]["unpacked"]["per_device_train_batch_size"]
    return make_chats((case.num_steps + 2) * per_step, vocab_size=case.settings["vocab_size"])


def make_plan(case: Case) -> Plan:
    """A plan by hand, with the values of trl_settings.yaml."""
    lora = case.options.get("lora", {})
    adapt = AdaptPlan(method="lora", r=lora["r"], lora_alpha=lora["lora_alpha"]) if case.has_lora else None
    rates = {"learning_rate": case.options["learning_rate"], "muon_learning_rate": 0.02, "muon_momentum": 0.95}
    moments = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    facts = {"num_train_tokens": 1, "num_heldout_tokens": 1, "train_bytes": 1, "heldout_bytes": 1, "separator_id": 0}
    return Plan(
        device="cpu",
        precision=case.precision,  # type: ignore[arg-type]
        torch_compile=False,
        attn_implementation="sdpa",
        gradient_checkpointing=False,
        deterministic=False,
        seed=1,
        model=ModelPlan(
            settings=case.settings, dropout=0.0, init="transformers", num_parameters=1, num_matrix_parameters=1
        ),
        adapt=adapt,
        optimizer=OptimizerPlan(
            name="adamw",
            weight_decay=SETTINGS["every_run"]["weight_decay"],
            max_grad_norm=SETTINGS["every_run"]["max_grad_norm"],
            **rates,
            **moments,
        ),
        schedule=SchedulePlan(
            name=case.options["lr_scheduler_type"],
            num_steps=case.num_steps,
            num_warmup_steps=0,
            num_decay_steps=case.num_steps,
            min_lr_ratio=0.0,
        ),
        corpus=CorpusFacts(vocab_size=case.settings["vocab_size"], fingerprint="chats", **facts),
        max_seq_length=MAX_LENGTH,
        micro_batch_size=1,
        total_batch_size=1,
        eval_batch_size=1,
        max_hours=None,
        eval_steps=0,
        eval_batches=None,
        save_steps=0,
        save_total_limit=None,
        sample_steps=0,
        sample_prompts=(),
        sample_max_new_tokens=1,
        early_stopping_patience=None,
        dataloader_num_workers=0,
        dataloader_prefetch_factor=1,
        dataset_num_proc=1,
        flops_per_token=1.0,
        peak_flops=1.0,
        reasons={},
    )


class Allocations:
    """The peak of what PyTorch allocates on the CPU inside the block, beyond what was there before."""

    peak_bytes = 0

    def __enter__(self) -> "Allocations":
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
        self._profiler.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profiler.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
        self.peak_bytes = int(max(np.cumsum([num_bytes for _, num_bytes in changes])))


def _resident_bytes(state: TrainState) -> int:
    optimizer = state.optimizer
    return _distinct_bytes(
        [*state.model.parameters(), *optimizer.masters.values(), *optimizer.state_tensors().values()]
    )


def _distinct_bytes(tensors: Sequence[torch.Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _num_parameters(settings: dict[str, Any]) -> int:
    from onecard.model.build import count_parameters

    return count_parameters(settings)[0]


if __name__ == "__main__":
    main()
