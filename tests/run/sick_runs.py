"""Real tiny runs that have a disease, and healthy ones, for the tests and for benchmarks/findings.py.

Training, data, record, detectors and report are those of any run. Where this machine cannot be ill itself, the sensors'
lowest boundary (NVML, psutil) says what that of an ill machine would; a run on the CPU is then watched as one on a GPU.
"""

import contextlib
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from eight_chats import write_chats

import onecard
from onecard.errors import DivergedError
from onecard.observe.events import DeviceEvent, Event, FindingEvent

GIB = 1024**3
# A byte that stands in some of the sentences only.
RARE = "~"
_WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew potent jade elixir"
USUAL: dict[str, Any] = {
    "tokenizer": "bytes",
    "max_seq_length": 16,
    "model_config": {"model_type": "qwen3", "intermediate_size": 48},
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dropout": 0.0,
    "per_device_train_batch_size": 4,
    "total_batch_size": 8,
    "max_steps": 80,
    "eval_steps": 20,
    "eval_batches": 2,
    "sample_steps": 0,
    "save_steps": 0,
    "optim": "adamw",
    "learning_rate": 3e-3,
    "dataloader_num_workers": 1,
    "precision": "fp32",
    "torch_compile": False,
    "device": "cpu",
    "report_to": "none",
}
# Of chats, which have a model to begin with.
_FROM_SCRATCH = ("tokenizer", "model_config", "hidden_size", "num_hidden_layers", "num_attention_heads")
_NOT_OF_CHATS = (*_FROM_SCRATCH, "num_key_value_heads", "eval_steps", "eval_batches")


class Findings:
    """Hears a run and keeps what it found."""

    def __init__(self) -> None:
        self.by_id: dict[str, FindingEvent] = {}
        self.readings: list[DeviceEvent] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, FindingEvent):
            self.by_id[event.id] = event
        elif isinstance(event, DeviceEvent):
            self.readings.append(event)


@dataclass(frozen=True)
class Place:
    """Where runs are made: a folder for each, and tiny models for those on chats, by family."""

    folder: Path
    find_base: Callable[[str], Path]


@dataclass(frozen=True)
class Kind:
    """A kind of run: settings beside the usual ones (None: left out), what befalls it, and what is to be found.

    `may_find` are findings that it may have besides; `family` names the model of a run on chats, `chats` those;
    `says` are words of the evidence or the remedy.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    befalls: Callable[[pytest.MonkeyPatch], None] | None = None
    finds: frozenset[str] = frozenset()
    may_find: frozenset[str] = frozenset()
    family: str | None = None
    text: Callable[[], str] | None = None
    chats: Callable[[], list[Any]] | None = None
    is_timed: bool = False
    on_event: Callable[[], Callable[[Event], None]] | None = None
    says: tuple[str, ...] = ()


def run(kind: Kind, place: Place, patch: pytest.MonkeyPatch) -> dict[str, FindingEvent]:
    """Makes a run in `place.folder / "run"` and gives what it found, by id."""
    heard, more = Findings(), kind.on_event() if kind.on_event else None
    if kind.is_timed:
        be_impatient(patch)
    if kind.befalls is not None:
        kind.befalls(patch)
    recipe = onecard.load_recipe(_settings(kind, place))

    def hear(event: Event) -> None:
        heard(event)
        if more is not None:
            more(event)

    with contextlib.suppress(DivergedError):  # some of them are stopped
        onecard.train(recipe, output_dir=place.folder / "run", on_event=hear)
    return heard.by_id


def be_impatient(patch: pytest.MonkeyPatch) -> None:
    """Lets detectors of time speak after no time, and sensors be read at each step."""
    patch.setattr("onecard.observe.detectors.history.LEAST_ELAPSED_S", 0.0)
    patch.setattr("onecard.run.observation._READING_INTERVAL_S", 0.0)


def _settings(kind: Kind, place: Place) -> dict[str, Any]:
    place.folder.mkdir(parents=True, exist_ok=True)
    given = dict(USUAL)
    if kind.family is None:
        path = place.folder / "text.txt"
        path.write_text((kind.text or sentences)(), encoding="utf-8", newline="\n")
    else:
        path = write_chats(place.folder / "chats.jsonl", (kind.chats or sums)())
        given = {key: value for key, value in given.items() if key not in _NOT_OF_CHATS}
        given |= {"model_name_or_path": str(place.find_base(kind.family)), "max_seq_length": 48, "eval_fraction": 0.0}
    given |= {"dataset": [{"path": str(path)}]} | kind.changes
    if isinstance(given.get("eval_dataset"), Callable):  # type: ignore[arg-type]
        other = place.folder / "heldout.txt"
        other.write_text(given["eval_dataset"](), encoding="utf-8", newline="\n")
        given["eval_dataset"] = [{"path": str(other)}]
    return {key: value for key, value in given.items() if value is not None}


def sentences(number: int = 4000, seed: int = 1) -> str:
    """Sentences of a small vocabulary, never the same for long."""
    draw, words = random.Random(seed), _WORDS.split()
    return " ".join(draw.choice(words) + (".\n" if index % 9 == 8 else "") for index in range(number))


def sentences_with_rare() -> str:
    """Sentences of which one in some hundred words has a byte that the others lack."""
    draw = random.Random(2)
    return " ".join(word + (RARE if draw.random() < 0.006 else "") for word in sentences(12_000).split(" "))


def random_words(number: int, seed: int) -> Callable[[], str]:
    """Words of random letters: what is known of some says nothing of the others."""

    def make() -> str:
        draw = random.Random(seed)
        return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(number))

    return make


def pairs() -> str:
    """Letters that come in pairs: half of them can be known, and none by how often it stands there."""
    draw = random.Random(4)
    return "".join(2 * draw.choice("abcdefgh") for _ in range(8000))


def sums() -> list[Any]:
    """Chats of which there are so many that sixty steps read them twice."""
    return [
        [{"role": "user", "content": f"What is {a} plus {b}?"}, {"role": "assistant", "content": f"It is {a + b}."}]
        for a in range(16)
        for b in range(16)
    ]


# What befalls a run.


def _slowed(target: str, seconds: float) -> Callable[[pytest.MonkeyPatch], None]:
    def befall(patch: pytest.MonkeyPatch) -> None:
        module, _, name = target.rpartition(".")
        owner = _find(module)
        function = getattr(owner, name)

        def slow(*args: Any, **keywords: Any) -> Any:
            time.sleep(seconds)
            return function(*args, **keywords)

        patch.setattr(owner, name, slow)

    return befall


def _find(path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _batches(change: Callable[[int, Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Lets `change(step, batch)` give the batches of each step, counted from 1, as a broken file would."""

    def befall(patch: pytest.MonkeyPatch) -> None:
        from onecard.data.stream import BatchStream

        build, made = BatchStream._build_step, [0]

        def changed(self: Any, *args: Any) -> Any:
            made[0] += 1
            return [change(made[0], batch) for batch in build(self, *args)]

        patch.setattr(BatchStream, "_build_step", changed)

    return befall


def _mask(_: int, batch: Any) -> Any:
    """An audit or a template that finds no answer."""
    return replace(batch, targets=torch.full_like(batch.targets, -100), num_targets=0)


def _poison(step: int, batch: Any) -> Any:
    """One step of bytes that are no text."""
    if step != 110:
        return batch
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(128, 256, batch.ids.shape, generator=draw)
    return replace(batch, ids=ids, targets=ids.roll(-1, 1))


def _with_dead_adapters(patch: pytest.MonkeyPatch) -> None:
    """Adapters that have no part in the result, whatever is done to one of their two matrices."""

    def kill(state: Any) -> None:
        for name, master in state.optimizer.masters.items():
            if "lora_A" in name:
                master.zero_()
        state.optimizer.load_masters(state.optimizer.masters)

    _assembled(patch, kill)


def _in_fp16(patch: pytest.MonkeyPatch) -> None:
    """fp16 on the CPU, and a row of the embedding beyond its range: each batch that has the byte overflows."""
    patch.setattr("onecard.planner.decisions.choose_precision", lambda *_: ("fp16", "asked for"))

    def overflow(state: Any) -> None:
        name = next(name for name in state.optimizer.masters if "embed" in name)
        # The separator comes first, then the bytes that can be printed.
        state.optimizer.masters[name][1 + ord(RARE) - ord("!")] = 1e6
        state.optimizer.load_masters(state.optimizer.masters)

    _assembled(patch, overflow)


def _assembled(patch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    from onecard.run import start

    assemble = start.assemble

    def changed(*args: Any, **keywords: Any) -> Any:
        state = assemble(*args, **keywords)
        with torch.no_grad():
            change(state)
        return state

    patch.setattr(start, "assemble", changed)


# What an ill machine says.


class Card:
    """NVML of one card, as far as it is asked; what is given differs from a card that is well."""

    NVML_TEMPERATURE_GPU = 0
    NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_DRIVER_NOT_LOADED = 12, 9

    class NVMLError(Exception):
        pass

    def __init__(self, **states: Any) -> None:
        usual = {
            "share": 97,
            "celsius": 65,
            "throttle": 0,
            "limit_w": 170,
            "used": 8 * GIB,
            "others": 0,
            "joined": None,
        }
        self.state = usual | states
        self.num_read = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not name.startswith("nvml"):
            raise AttributeError(name)
        return lambda *_: self._answer(name)

    def _answer(self, name: str) -> Any:
        state = self.state
        self.num_read += name == "nvmlDeviceGetComputeRunningProcesses"
        num_others = state["others"] if state["joined"] is None or self.num_read <= 6 else state["joined"]
        pids = [os.getpid(), *range(1, num_others + 1)]
        answers: dict[str, Any] = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByUUID": "card",
            "nvmlDeviceGetHandleByIndex": "card",
            "nvmlSystemGetDriverVersion": "535.54",
            "nvmlDeviceGetName": "NVIDIA GeForce RTX 3060",
            "nvmlDeviceGetUUID": "GPU-1",
            "nvmlDeviceGetCudaComputeCapability": (8, 6),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=state["share"], memory=40),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(
                total=12 * GIB, free=12 * GIB - state["used"], used=state["used"]
            ),
            "nvmlDeviceGetTemperature": state["celsius"],
            "nvmlDeviceGetCurrentClocksThrottleReasons": state["throttle"],
            "nvmlDeviceGetPowerUsage": 150_000,
            "nvmlDeviceGetEnforcedPowerLimit": 1000 * state["limit_w"],
            "nvmlDeviceGetPowerManagementDefaultLimit": 170_000,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=pid, usedGpuMemory=GIB) for pid in pids],
        }
        return answers.get(name)


def on_card(
    *,
    platform: str = "linux",
    is_slow: bool = False,
    plan: Callable[[Any], dict[str, Any]] = lambda _: {},
    **states: Any,
) -> Callable[[pytest.MonkeyPatch], None]:
    """Lets the run be watched as one on this card; where it is slow, a twentieth of its step was planned.

    `plan` gives what else the plan of such a run would have.
    """

    def befall(patch: pytest.MonkeyPatch) -> None:
        from onecard.run import session
        from onecard.run.observation import Observer

        class OnCard(Observer):
            def __init__(self, made: Any, *others: Any) -> None:
                changes: dict[str, Any] = {"device": "cuda:0"} | plan(made)
                if is_slow:
                    time = made.forecast.time
                    keys = ("step_s", "step_low_s", "step_high_s")
                    sooner = time.model_copy(update={key: getattr(time, key) / 20 for key in keys})
                    changes["forecast"] = made.forecast.model_copy(update={"time": sooner})
                super().__init__(made.model_copy(update=changes), *others)

        patch.setitem(sys.modules, "pynvml", Card(**states))
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
        patch.setattr("onecard.hardware.probe.find_platform", lambda *_: platform)
        patch.setattr(session, "Observer", OnCard)
        _on_host(patch, cpu=60.0, own=58.0)

    return befall


def _on_host(patch: pytest.MonkeyPatch, *, cpu: float, own: float) -> None:
    """Lets psutil say how busy all cores are, and how much of that is this process."""
    patch.setattr(psutil, "cpu_percent", lambda *_, **__: cpu)
    patch.setattr(psutil.Process, "cpu_percent", lambda *_, **__: own * (psutil.cpu_count() or 1))


def _slow_disk(patch: pytest.MonkeyPatch) -> None:
    _slowed("onecard.data.stream.BatchStream._build_step", 0.1)(patch)
    _on_host(patch, cpu=10.0, own=5.0)


def _slow_steps(*, cpu: float, own: float) -> Callable[[pytest.MonkeyPatch], None]:
    def befall(patch: pytest.MonkeyPatch) -> None:
        # A plan that was made while nothing else ran.
        patch.setattr("onecard.planner.on_cpu.measure_step", lambda *_: 0.005)
        _slowed("onecard.run.stepping.train_step", 0.03)(patch)
        _on_host(patch, cpu=cpu, own=own)

    return befall


def _on_battery(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=False), raising=False)


def _beside_a_card(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "pynvml", Card())


def _growing_allocator(patch: pytest.MonkeyPatch) -> None:
    """The mark of CUDA's allocator, which a CPU has not."""
    on_card()(patch)
    begun = [4 * GIB]

    def reserved(_: Any) -> int:
        begun[0] += 2 << 20
        return begun[0]

    patch.setattr("onecard.run.loop._reserved_bytes", reserved)


def _low_mark(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("onecard.observe.detectors.memory._LEAST_BYTES", 32 << 20)


def keep_all() -> Callable[[Event], None]:
    """A callback that keeps what every step makes."""
    kept: list[bytes] = []

    def keep(event: Event) -> None:
        if event.event == "step":
            kept.append(b"x" * (8 << 20))

    return keep


def _ids(*names: str) -> frozenset[str]:
    return frozenset(names)


# Whatever else runs on the machine of a test, and whatever else its disk is busy with.
MACHINE = _ids("cpu-shared", "slower-than-planned", "saving-too-often")
_DRILLED = {"learning_rate": 3e-3, "max_steps": 160}
_PAIRS = {"tokenizer": "char", "lr_scheduler_type": "constant", "eval_steps": 0, "num_key_value_heads": None}
_PAIRS |= {"model_config": {"model_type": "gpt2"}}
DISEASES: dict[str, Kind] = {
    "everything masked": Kind(
        {"max_steps": 30}, _batches(_mask), _ids("everything-masked"), family="llama", says=("0 of ",)
    ),
    "adapters without a part": Kind(
        {"method": "lora", "max_steps": 30},
        _with_dead_adapters,
        _ids("nothing-trains"),
        family="llama",
        says=("method: full (a gradient above 0",),
    ),
    "a rate that diverges": Kind(
        {"learning_rate": 5.0, "max_grad_norm": None},
        finds=_ids("divergence"),
        says=(
            "and guessing gives 5.55",
            "(the loss falls instead of rising)",
        ),
    ),
    "a rate that rises too far": Kind(
        _PAIRS | {"learning_rate": 0.3, "warmup_steps": 450, "max_steps": 520},
        finds=_ids("loss-rising"),
        may_find=_ids("rate-too-high"),
        text=pairs,
    ),
    "a rate too low": Kind(
        {"learning_rate": 1e-9}, finds=_ids("rate-too-low"), says=("learning_rate: 1e-03 (updates large enough",)
    ),
    "a rate too high": Kind(
        _PAIRS | {"learning_rate": 0.3, "warmup_steps": 0}, finds=_ids("rate-too-high"), text=pairs
    ),
    "a poisoned batch": Kind(_DRILLED, _batches(_poison), _ids("loss-spike"), says=("at step 110",)),
    "fp16 that overflows": Kind(
        {"max_steps": 160, "tie_word_embeddings": False, "eval_steps": 0},
        _in_fp16,
        _ids("loss-scale-collapsing"),
        _ids("update-refused"),
        text=sentences_with_rare,
    ),
    "weights that begin at nothing": Kind(
        {"model_config": {"model_type": "llama", "intermediate_size": 48, "initializer_range": 1e-12}}
        | {"adam_epsilon": 1.0},
        finds=_ids("gradient-vanishing"),
    ),
    "a limit far below the norm": Kind(
        {"max_grad_norm": 1e-3, "max_steps": 140},
        finds=_ids("clipping-always"),
        says=("100% of the last 100 gradients were clipped",),
    ),
    "little text read often": Kind(
        {"eval_dataset": random_words(200, 9), "eval_batches": None, "learning_rate": 1e-2, "max_steps": 120},
        finds=_ids("overfitting"),
        text=random_words(60, 3),
        says=(
            "best checkpoint: step-",
            "without",
        ),
    ),
    "few chats read often": Kind(
        {"learning_rate": 1e-3, "max_steps": 60},
        finds=_ids("data-repeated"),
        family="llama",
        chats=lambda: sums()[::32],
    ),
    "a card that is not used": Kind(
        {"device": "auto", "max_steps": 12},
        _beside_a_card,
        _ids("gpu-unused"),
        says=(
            "this machine has NVIDIA GeForce RTX 3060",
            "PyTorch is built without CUDA",
        ),
    ),
    "a slow disk": Kind(
        {"dataloader_num_workers": 0, "max_steps": 40},
        _slow_disk,
        _ids("starved-by-data"),
        MACHINE,
        is_timed=True,
        says=("dataloader_num_workers: 2 instead of 0 (without waiting",),
    ),
    "saving at every step": Kind(
        {"save_steps": 1, "save_total_limit": 2, "max_steps": 24, "eval_steps": 0},
        finds=_ids("saving-too-often"),
        may_find=MACHINE,
        is_timed=True,
        says=("save_steps: 0 instead of 1 (0 means at the end of the run alone)",),
    ),
    "evaluating at every step": Kind(
        {"eval_steps": 1, "max_steps": 24, "eval_batches": None, "eval_fraction": 0.5, "learning_rate": 1e-9},
        finds=_ids("evaluating-too-often"),
        may_find=MACHINE,
        is_timed=True,
        says=("eval_steps: ",),
    ),
    "steps slower than planned": Kind(
        {"eval_steps": 0}, _slow_steps(cpu=60.0, own=58.0), _ids("slower-than-planned"), is_timed=True
    ),
    "a busy machine": Kind(
        {"eval_steps": 0},
        _slow_steps(cpu=95.0, own=40.0),
        _ids("cpu-shared"),
        is_timed=True,
        says=("other programs use 55% of the CPU",),
    ),
    "a battery": Kind(
        {"max_steps": 30},
        _on_battery,
        _ids("on-battery"),
        MACHINE,
        is_timed=True,
        says=(
            "the mains are not connected",
            "full power again",
        ),
    ),
    "a callback that keeps": Kind(
        {"max_steps": 60}, _low_mark, _ids("host-memory-grows"), MACHINE, is_timed=True, on_event=keep_all
    ),
    "heat": Kind(
        {"max_steps": 30},
        on_card(throttle=0x20, celsius=88),
        _ids("throttled-by-heat"),
        MACHINE,
        is_timed=True,
        says=(
            "in 6 of the last 6 readings",
            "88 degrees",
            "nvidia-smi -pl 136",
        ),
    ),
    "a lowered power limit": Kind(
        {"max_steps": 30},
        on_card(throttle=0x4, limit_w=100),
        _ids("throttled-by-power"),
        MACHINE,
        is_timed=True,
        says=(
            "100 W",
            "170 W",
            "nvidia-smi -pl 170",
            "1.7 times the power",
        ),
    ),
    "a power brake": Kind(
        {"max_steps": 30}, on_card(throttle=0x80), _ids("throttled-by-power"), MACHINE, is_timed=True
    ),
    "others on the card": Kind(
        {"max_steps": 40},
        on_card(others=1, is_slow=True),
        _ids("card-shared"),
        is_timed=True,
        says=("processes of others that compute on the card: 1, holding 1.0 GiB",),
    ),
    "others on the card under Windows": Kind(
        {"max_steps": 40},
        on_card(platform="windows", others=12, joined=13, is_slow=True),
        _ids("card-shared"),
        is_timed=True,
        says=("programs of others that hold memory of the card: 13, when the run began 12",),
    ),
    "a full card under Windows": Kind(
        {"max_steps": 40},
        on_card(platform="windows", used=12 * GIB - 1, is_slow=True),
        _ids("memory-spilled"),
        is_timed=True,
        says=(
            "12.0 GiB are taken on a card of 12.0 GiB",
            "per_device_train_batch_size: 2",
        ),
    ),
    "a card that waits for Python": Kind(
        {"max_steps": 40},
        on_card(share=40),
        _ids("compile-missing"),
        MACHINE,
        is_timed=True,
        says=(
            "the card computed in 40% of the time",
            "torch_compile: true",
        ),
    ),
    "a card with too little to do": Kind(
        {"max_steps": 40, "torch_compile": "auto"},
        on_card(share=40),
        _ids("batch-too-small"),
        MACHINE,
        is_timed=True,
        says=("per_device_train_batch_size: 8, gradient_accumulation_steps: 1",),
    ),
    "an allocator that grows": Kind(
        {"max_steps": 640, "eval_steps": 0, "hidden_size": 16, "num_hidden_layers": 1},
        _growing_allocator,
        _ids("card-memory-grows"),
        MACHINE | _ids("data-repeated"),
    ),
}

LONG_TEXT: dict[str, Callable[[], str]] = {"text": lambda: sentences(400_000)}
_TWO_ROUNDS = [[*first, *second] for first, second in pairwise(sums())]
_CHATS = {"max_steps": 60, "learning_rate": 1e-3}
_LORA = {"method": "lora", "max_steps": 60, "learning_rate": 5e-3}
HEALTHY: dict[str, Kind] = {
    "muon": Kind({"optim": "muon"}),
    "adamw": Kind(),
    "8-bit": Kind({"optim": "adamw_8bit"}),
    "bf16": Kind({"precision": "bf16"}),
    "gpt2": Kind({"model_config": {"model_type": "gpt2"}, "num_key_value_heads": None}),
    "llama": Kind({"model_config": {"model_type": "llama", "intermediate_size": 48}}),
    "characters": Kind({"tokenizer": "char"}),
    "bpe": Kind({"tokenizer": "bpe", "vocab_size": 300}),
    "cosine": Kind({"lr_scheduler_type": "cosine", "warmup_ratio": 0.1}),
    "linear": Kind({"lr_scheduler_type": "linear", "warmup_steps": 20}),
    "constant": Kind({"lr_scheduler_type": "constant"}),
    "high rate": Kind({"learning_rate": 2e-2}),
    "low rate": Kind({"learning_rate": 5e-4}),
    "batch of one": Kind({"total_batch_size": 1, "per_device_train_batch_size": 1}),
    "no clipping": Kind({"max_grad_norm": None}),
    "early stopping": Kind({"early_stopping_patience": 3, "eval_steps": 10}),
    "tiny text": Kind(
        {"max_steps": 25, "eval_steps": 5}, text=lambda: 60 * "the quick brown fox jumps over a lazy dog\n"
    ),
    "long": Kind({"max_steps": 250, "eval_steps": 50}),
    "nothing held out": Kind({"eval_fraction": 0.0, "eval_batches": None, "eval_steps": 0}),
    "dropout": Kind({"dropout": 0.2}),
    "samples": Kind({"sample_steps": 20, "sample_prompts": ["the "], "sample_max_new_tokens": 4}),
    "saving": Kind({"save_steps": 20, "save_total_limit": 2}),
    "half of the time": Kind({"max_power_share": 0.5}),
    "chats": Kind(_CHATS, family="llama"),
    "chats of gpt2": Kind(_CHATS, family="gpt2"),
    "chats, a row each": Kind(_CHATS | {"packing": False}, family="llama"),
    "chats of several rounds": Kind(_CHATS | {"max_seq_length": 64}, family="qwen3", chats=lambda: _TWO_ROUNDS),
    "lora": Kind(_LORA, family="llama"),
    "lora of gpt2": Kind(_LORA, family="gpt2"),
    "qlora": Kind(_LORA | {"method": "qlora"}, family="llama"),
}
# So like others that seconds of them tell nothing more: made by benchmarks/findings.py alone.
ONLY_LASTING = ("adamw", "llama", "cosine", "constant", "low rate", "no clipping", "long", "samples", "saving")
ONLY_LASTING += ("characters", "bpe", "linear", "high rate", "batch of one")
ONLY_LASTING += ("chats of gpt2", "chats of several rounds", "lora of gpt2")
# With what the package needs of others.
NEEDS_BITSANDBYTES = ("qlora",)
