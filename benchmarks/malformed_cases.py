"""Inputs that work for every command, and what is made of them by hand."""

import gzip
import io
import json
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from words import WORDS

RECIPE = """
dataset: text.txt
tokenizer: bytes
max_seq_length: 64
model_config: {model_type: qwen3, intermediate_size: 48}
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
num_key_value_heads: 2
per_device_train_batch_size: 2
total_batch_size: 4
max_steps: 4
eval_steps: 2
eval_batches: 2
sample_steps: 2
sample_prompts: ["the "]
sample_max_new_tokens: 4
save_steps: 2
dataloader_num_workers: 0
precision: fp32
torch_compile: false
device: cpu
report_to: none
""".lstrip()
CHAT_RECIPE = """
task: sft
method: lora
dataset: chats.jsonl
model_name_or_path: base
chat_template: chatml
max_seq_length: 64
lora_r: 2
per_device_train_batch_size: 2
total_batch_size: 4
max_steps: 2
eval_steps: 2
save_steps: 1
dataloader_num_workers: 0
precision: fp32
torch_compile: false
device: cpu
report_to: none
""".lstrip()
# After the files of `write_inputs`, in this order.
MADE_BY = (
    "train tiny.yaml --output_dir run",
    "export run --to hf --dtype f32 --output base",
    "train chat.yaml --output_dir chatrun",
)
LAST = "run/checkpoints/step-000004"
LAST_CHAT = "chatrun/checkpoints/step-000002"


def write_inputs(place: Path) -> None:
    """Writes texts, chats and recipes that work."""
    draw = random.Random(1)
    lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(160)]
    text = "\n".join(lines) + "\n"
    (place / "text.txt").write_text(text, encoding="utf-8")
    rows = [{"text": line} for line in lines]
    jsonl = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "text.jsonl").write_text(jsonl, encoding="utf-8")
    (place / "text.json").write_text(json.dumps(rows), encoding="utf-8")
    (place / "text.jsonl.gz").write_bytes(gzip.compress(jsonl.encode(), mtime=0))
    (place / "text.tar").write_bytes(tar_of({f"{n}.txt": line.encode() for n, line in enumerate(lines[:40])}))
    write_parquet(place / "text.parquet", rows)
    chats = [chat_row(draw) for _ in range(24)]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    write_parquet(place / "chats.parquet", chats)
    (place / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    (place / "chat.yaml").write_text(CHAT_RECIPE, encoding="utf-8")
    (place / "prompts.txt").write_text("the quick\na lazy\n", encoding="utf-8")
    prompts = [IFEVAL_PROMPT | {"key": n, "prompt": f"{n} {IFEVAL_PROMPT['prompt']}"} for n in range(3)]
    (place / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    answers = [{"prompt": row["prompt"], "response": "seven wizards"} for row in prompts]
    (place / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    (place / "full").mkdir()
    (place / "full" / "kept.txt").write_text("kept", encoding="utf-8")
    (place / "home").mkdir()
    (place / "home" / "cards.toml").write_text(CARD, encoding="utf-8")


IFEVAL_PROMPT = {
    "prompt": "Write without commas.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}
CARD = ""


def chat_row(draw: random.Random) -> dict[str, object]:
    turns = [("user", 4), ("assistant", 5)]
    return {"messages": [{"role": role, "content": " ".join(draw.choices(WORDS, k=k))} for role, k in turns]}


def tar_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


Spoil = Callable[[Path], object]
Content = bytes | str | None


def _nothing(place: Path) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """A command among spoiled inputs, and the words that its message must have."""

    what: str
    words: str
    spoil: Spoil = _nothing
    names: tuple[str, ...] = ()
    code: int = 2
    stdin: bytes = b""


def files(contents: dict[str, Content]) -> Spoil:
    """Writes files, or removes what is named with None."""

    def spoil(place: Path) -> None:
        for name, content in contents.items():
            path = place / name
            if content is None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    return spoil


def edited(name: str, old: str, new: str) -> Spoil:
    """Replaces a text of a file, which must be there."""

    def spoil(place: Path) -> None:
        text = (place / name).read_text(encoding="utf-8")
        assert old in text, f"{old!r} is not in {name}"
        (place / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return spoil


def in_json(name: str, change: Callable[[dict], object]) -> Spoil:
    """Changes a JSON document in place."""

    def spoil(place: Path) -> None:
        document = json.loads((place / name).read_text(encoding="utf-8"))
        change(document)
        (place / name).write_text(json.dumps(document), encoding="utf-8")

    return spoil


def cut(name: str, share: float) -> Spoil:
    def spoil(place: Path) -> None:
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def flipped(name: str, at: float) -> Spoil:
    def spoil(place: Path) -> None:
        content = bytearray((place / name).read_bytes())
        content[int(len(content) * at)] ^= 0x55
        (place / name).write_bytes(content)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(place: Path) -> None:
        for each in spoils:
            each(place)

    return spoil


def as_folder(name: str) -> Spoil:
    """Puts a folder where a file is expected."""

    def spoil(place: Path) -> None:
        path = place / name
        if path.exists():
            path.unlink()
        path.mkdir(parents=True)

    return spoil


def linked(name: str, to: str) -> Spoil:
    def spoil(place: Path) -> None:
        path = place / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        path.symlink_to(to)

    return spoil


def weights(name: str, change: Callable[[dict], dict]) -> Spoil:
    """Rewrites a safetensors file with other tensors."""

    def spoil(place: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(place / name)), place / name, metadata={"format": "pt"})

    return spoil


def _others(tensors: dict) -> dict:
    return {f"other.{name}": tensor for name, tensor in tensors.items()}


def _halved(tensors: dict) -> dict:
    return {name: tensor[: max(1, len(tensor) // 2)].clone() for name, tensor in tensors.items()}


def _as_integers(tensors: dict) -> dict:
    import torch

    return {name: tensor.to(torch.int8) for name, tensor in tensors.items()}


def _nan(tensors: dict) -> dict:
    return {name: tensor * float("nan") for name, tensor in tensors.items()}


def _without_one(tensors: dict) -> dict:
    return dict(sorted(tensors.items())[1:])


def _moved(vocabulary: dict[str, int]) -> dict[str, int]:
    return {token: number + 500 for token, number in vocabulary.items()}


def header(document: object) -> bytes:
    text = json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text


def chats(*rows: object) -> Spoil:
    """Replaces the chats; a text stands for itself."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    return files({"chats.jsonl": "".join(line + "\n" for line in lines)})


def turns(*pairs: tuple[object, object]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def _recipes() -> list[Case]:
    def bad(what: str, content: Content, *names: str, verb: str = "train", code: int = 2) -> Case:
        return Case(f"{verb}: {what}", f"{verb} bad.yaml", files({"bad.yaml": content}), names or ("bad.yaml",), code)

    def with_line(what: str, line: str, *names: str, verb: str = "train", code: int = 2) -> Case:
        key = line.partition(":")[0]
        kept = "".join(f"{row}\n" for row in RECIPE.splitlines() if not row.startswith(f"{key}:"))
        return bad(what, f"{kept}{line}\n", *names, verb=verb, code=code)

    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    return [
        bad("an empty recipe", "", "empty"),
        bad("a recipe of comments", "# nothing\n", "empty"),
        bad("a tab that indents", "dataset: text.txt\n\tmax_steps: 3\n", "line 2"),
        bad("a bracket that is not closed", "dataset: [text.txt\nmax_steps: 3\n", "line"),
        bad("a quote that is not closed", 'dataset: "text.txt\nmax_steps: 3\n', "line"),
        bad("a list for a recipe", "- dataset\n- text.txt\n", "list"),
        bad("a sentence for a recipe", "train on text.txt please\n", "key: value"),
        bad("JSON with a comma too many", '{"dataset": "text.txt",, }\n', "line"),
        bad("a key given twice", f"{RECIPE}max_steps: 5\n", "max_steps", "twice"),
        bad("two documents", f"{RECIPE}---\n{RECIPE}"),
        bad("UTF-16", RECIPE.encode("utf-16"), "UTF-8"),
        bad("UTF-16 without a mark", RECIPE.encode("utf-16-le")),
        bad("Latin-1", "dataset: text.txt\nname: Übung\n".encode("latin-1"), "UTF-8"),
        bad("a binary recipe", bytes(range(256)) * 8),
        bad("a NUL", RECIPE + "name: a\0b\n"),
        bad("an object of Python", "dataset: !!python/object/apply:os.system ['true']\n", "python"),
        bad("an unknown tag", "dataset: !mine text.txt\n", "mine"),
        bad("an alias that is not there", "dataset: *text\n", "text"),
        bad("a list that holds itself", "dataset: &a [*a]\n"),
        bad("a mapping that holds itself", "model_config: &a {model_type: qwen3, b: *a}\ndataset: text.txt\n"),
        bad("a bomb of aliases", f"{bomb}dataset: *i\n"),
        bad("nesting without end", "dataset: " + "[" * 3000 + "]" * 3000 + "\n"),
        bad("a date that is none", f"{RECIPE}name: 2026-99-99\n", verb="plan"),
        bad("a number of 5,000 digits", f"{RECIPE}seed: {'9' * 5000}\n", verb="plan"),
        with_line("a key with a slip", "learning_rat: 0.1", "learning_rate"),
        with_line("a key of another tool", "block_sise: 3", "block_sise"),
        with_line("a number as a key", "7: 3", "7"),
        with_line("a list as a key", "? [a, b]\n: 3"),
        with_line("a null key", "~: 3"),
        with_line("a text for a number", "max_steps: many", "max_steps", "many"),
        with_line("a fraction of a step", "max_steps: 2.5", "max_steps", "2.5"),
        with_line("no steps", "max_steps: 0", "max_steps"),
        with_line("steps below none", "max_steps: -3", "max_steps", verb="plan"),
        with_line("a rate that is no number", "learning_rate: .nan", "learning_rate", verb="prepare"),
        with_line("an endless rate", "learning_rate: .inf", "learning_rate"),
        with_line("a rate below zero", "learning_rate: -1e-3", "learning_rate"),
        with_line("a share above one", "warmup_ratio: 1.5", "warmup_ratio"),
        with_line("dropout of one", "dropout: 1.0", "dropout"),
        with_line("true for a number", "seed: true", "seed"),
        with_line("a list for a number", "hidden_size: [32]", "hidden_size"),
        with_line("a mapping for a number", "max_seq_length: {a: 1}", "max_seq_length"),
        with_line("a number for a path", "dataset: 3", "dataset"),
        with_line("a null data set", "dataset: null", "dataset"),
        with_line("an empty data set", 'dataset: ""', "dataset"),
        with_line("an empty list of data sets", "dataset: []", "dataset"),
        with_line("a source without its path", "dataset: {split: train}", "path"),
        with_line("a source with a slip", "dataset: {path: text.txt, wieght: 2}", "wieght", "weight"),
        with_line("a source of no weight", "dataset: {path: text.txt, weight: -1}", "weight"),
        with_line("an unknown optimizer", "optim: adamx", "adamx"),
        with_line("an unknown schedule", "lr_scheduler_type: cosinus", "cosinus"),
        with_line("an unknown precision", "precision: fp8", "fp8"),
        with_line("an unknown device", "device: tpu", "tpu", verb="plan"),
        with_line("a GPU that is not here", "device: cuda:9", "cuda"),
        with_line("an unknown task", "task: dance", "dance"),
        with_line("an unknown method", "method: loraa", "loraa"),
        with_line("lora without a model", "method: lora", "model_name_or_path", verb="plan"),
        with_line("an unknown tracker", "report_to: [tensorbord]", "tensorbord"),
        with_line("heads that do not divide", "num_attention_heads: 5", "5"),
        with_line("more key heads than heads", "num_key_value_heads: 3", "3"),
        with_line("an unknown architecture", "model_config: {model_type: qwenn3}", "qwenn3"),
        with_line("an architecture without causal text", "model_config: {model_type: vit}", "vit"),
        with_line("a setting the architecture lacks", "model_config: {model_type: qwen3, intermediate_siz: 3}", "siz"),
        with_line(
            "a wrong type in the architecture", "model_config: {model_type: qwen3, rms_norm_eps: [1]}", "rms_norm_eps"
        ),
        with_line("a model_config file that is not there", "model_config: nothing.json", "nothing.json"),
        with_line("an unknown tokenizer", "tokenizer: bpee", "bpee"),
        with_line("a tokenizer that is not there", "tokenizer: ./tokens/none.json", "none.json", verb="prepare"),
        with_line("bytes with a vocabulary", "vocab_size: 100", "vocab_size", verb="prepare"),
        with_line("an unknown size", "size: huge", "huge"),
        with_line("sizes that are a list", "sizes: [a, b]", "sizes"),
        with_line("a size with a slip", "sizes: {big: {hiden_size: 3}}", "hiden_size"),
        with_line("a section of an unknown device", "on_device: {tpu: {max_steps: 3}}", "tpu"),
        with_line("a section with a slip", "on_device: {cpu: {max_step: 3}}", "max_step"),
        with_line("memory without a number", "memory_limit_gb: lots", "memory_limit_gb"),
        with_line("an unknown task to evaluate", "eval_tasks: [ifevall]", "ifevall"),
        with_line("a target module of a number", "lora_target_modules: 3", "lora_target_modules"),
        with_line("prompts that are no text", "sample_prompts: [3, {a: 1}]", "sample_prompts"),
        with_line("a model of a billion wide", "hidden_size: 1000000000", "hidden_size"),
        with_line("a model too large for any memory", "hidden_size: 200000", "240.1B", code=3, verb="train"),
        with_line("a length beyond all memory", "max_seq_length: 2000000000", verb="plan"),
        with_line("remote code", "trust_remote_code: true", "trust_remote_code"),
        Case("plan: a folder for a recipe", "plan full", names=("full", "folder")),
        Case("train: a recipe that is not there", "train nothing.yaml", names=("nothing.yaml",)),
        Case("train: a shipped recipe with a slip", "train dmo", names=("dmo", "demo")),
        Case("train: a path of 5,000 letters", f"train {'a' * 5000}.yaml"),
        Case("train: a recipe of odd letters", "train '\x1b[31mred'", names=("recipe",)),
        Case("train: a link to itself", "train loop.yaml", linked("loop.yaml", "loop.yaml"), ("loop.yaml",)),
        Case("prepare: a data file for a recipe", "prepare chats.jsonl"),
        Case("plan: a model for a recipe", "plan base/model.safetensors"),
        Case("recipes: an unknown recipe", "recipes dmeo", names=("dmeo", "demo")),
        Case("recipes: a file", "recipes tiny.yaml", names=("tiny.yaml",)),
        Case("recipes: an unknown flag", "recipes --key", names=("--key",)),
        Case("recipes: an empty name", 'recipes ""', names=("recipe",)),
        Case("recipes: two names", "recipes demo small-pretrain", names=("small-pretrain",)),
    ]


def _flags() -> list[Case]:
    rows: list[tuple[str, str, tuple[str, ...]]] = [
        ("none: a verb with a slip", "trian tiny.yaml", ("trian", "train")),
        ("none: no verb of ours", "fly", ("fly",)),
        ("none: an unknown flag", "--verbose", ("--verbose",)),
        ("train: nothing at all", "train", ("recipe",)),
        ("train: two recipes", "train tiny.yaml chat.yaml", ("tiny.yaml", "chat.yaml")),
        ("train: a flag with a slip", "train tiny.yaml --max_step 3", ("max_step", "max_steps")),
        ("train: a flag without its value", "train tiny.yaml --max_steps", ("--max_steps",)),
        ("train: a flag before a flag", "train tiny.yaml --max_steps --seed 3", ("--max_steps",)),
        ("train: a flag twice", "train tiny.yaml --max_steps 3 --max_steps 4", ("max_steps", "twice")),
        ("train: a text for a number", "train tiny.yaml --learning_rate fast", ("learning_rate", "fast")),
        ("train: two problems", "train tiny.yaml --max_steps x --optim y", ("max_steps", "optim")),
        ("train: a switch with a word", "train tiny.yaml --torch_compile perhaps", ("perhaps",)),
        ("train: an output that holds files", "train tiny.yaml --output_dir full", ("full", "output_dir")),
        ("train: an output that is a run", "train tiny.yaml --output_dir run", ("run", "resume")),
        ("train: an output that is a file", "train tiny.yaml --output_dir text.txt", ("text.txt",)),
        ("train: an output below a file", "train tiny.yaml --output_dir text.txt/run", ("text.txt",)),
        ("train: an output of 5,000 letters", f"train tiny.yaml --output_dir {'a' * 5000}", ("name",)),
        ("train: an output with no name", 'train tiny.yaml --output_dir ""', ("output_dir",)),
        ("train: to go on with nothing", 'train tiny.yaml --resume ""', ("--resume",)),
        ("train: to go on with what is no run", "train tiny.yaml --resume full", ("full",)),
        ("train: to go on with other settings", "train tiny.yaml --resume run --seed 4", ("seed",)),
        ("train: to go on with a run elsewhere", "train tiny.yaml --resume run --output_dir b", ("output_dir",)),
        ("train: to go on with latest of none", "train --resume latest", ("runs",)),
        ("train: a recipe that is --config, too", "train tiny.yaml --config chat.yaml", ("chat.yaml",)),
        ("plan: to explain what is no run", "plan --explain full", ("full",)),
        ("plan: to explain nothing", "plan --explain nothing", ("nothing",)),
        ("plan: an unknown card", "plan tiny.yaml --card rtx-9999", ("rtx-9999",)),
        ("plan: an unknown platform", "plan tiny.yaml --device auto --card rtx-3060-12gb --platform amiga", ("amiga",)),
        ("plan: a platform without a card", "plan tiny.yaml --platform windows", ("--platform",)),
        ("plan: no card between commas", "plan tiny.yaml --card ,", ("card",)),
        ("plan: to resume", "plan tiny.yaml --resume run", ("resume",)),
        ("prepare: nothing at all", "prepare", ("recipe",)),
        ("prepare: an output", "prepare tiny.yaml --outptu_dir x", ("outptu_dir", "output_dir")),
        ("resume: nothing at all", "resume", ("RUN",)),
        ("resume: a run that is not there", "resume nothing", ("nothing",)),
        ("resume: a recipe", "resume tiny.yaml", ("tiny.yaml",)),
        ("resume: a model", "resume base", ("base",)),
        ("resume: latest of none", "resume latest", ("runs",)),
        ("resume: a checkpoint that is not there", "resume run/checkpoints/step-000099", ("99",)),
        ("resume: a checkpoint that is no number", "resume run/checkpoints/last-one", ("last-one",)),
        ("resume: an unknown thing to accept", "resume run --accept everything", ("everything", "data")),
        ("resume: to verify no steps", "resume run --verify 0", ("--verify",)),
        ("resume: to verify a word", "resume run --verify ten", ("--verify",)),
        ("monitor: nothing at all", "monitor", ("RUN",)),
        ("monitor: a run that is not there", "monitor nothing --once", ("nothing",)),
        ("monitor: a model", "monitor base --once", ("base",)),
        ("monitor: latest of none", "monitor latest --once", ("runs",)),
        ("monitor: a file", "monitor text.txt --once", ("text.txt",)),
        ("report: nothing at all", "report", ("RUN",)),
        ("report: a run that is not there", "report nothing", ("nothing",)),
        ("report: an unknown language", "report run --lang xx", ("xx", "zh")),
        ("report: a folder of others", "report full", ("full",)),
        ("report: a file", "report run/events.jsonl", ("events.jsonl",)),
        ("compare: one run", "compare run", ("two",)),
        ("compare: nothing at all", "compare", ("RUN",)),
        ("compare: a run that is not there", "compare run nothing", ("nothing",)),
        ("compare: the same run twice", "compare run run", ("run",)),
        ("compare: a pattern that matches nothing", "compare 'none*'", ("none*",)),
        ("compare: an unknown axis", "compare run chatrun --over miles", ("miles",)),
        ("compare: an unknown curve", "compare run chatrun --curve best", ("best",)),
        ("replay: no step", "replay run", ("--step",)),
        ("replay: a step that is not there", "replay run --step 99", ("99",)),
        ("replay: step 0", "replay run --step 0", ("0",)),
        ("replay: a step below none", "replay run --step -1", ("-1",)),
        ("replay: a word for a step", "replay run --step two", ("--step",)),
        ("replay: a model", "replay base --step 1", ("base",)),
        ("replay: a run that is not there", "replay nothing --step 1", ("nothing",)),
        ("evaluate: nothing at all", "evaluate", ("run",)),
        ("evaluate: a run that is not there", "evaluate nothing", ("nothing",)),
        ("evaluate: a task with a slip", "evaluate run --tasks los", ("los",)),
        ("evaluate: no task", "evaluate run --tasks ,", ("task",)),
        ("evaluate: a checkpoint that is not there", "evaluate run --checkpoints 99", ("99",)),
        ("evaluate: a checkpoint with a slip", "evaluate run --checkpoints bset", ("bset",)),
        ("evaluate: no checkpoints", "evaluate run --checkpoints ''", ("checkpoints",)),
        ("evaluate: a limit of none", "evaluate run --limit 0", ("limit",)),
        ("evaluate: batches of none", "evaluate run --batch-size -2", ("batch",)),
        ("evaluate: an unknown device", "evaluate run --device gpu", ("gpu",)),
        ("evaluate: a device that is not here", "evaluate run --device cuda:7", ("cuda",)),
        ("evaluate: shots for the loss", "evaluate run --num-fewshot 3", ("num_fewshot",)),
        ("evaluate: turns for the loss", "evaluate run --apply-chat-template", ("apply_chat_template",)),
        ("evaluate: a text that is not there", "evaluate base --text nothing.txt", ("nothing.txt",)),
        ("evaluate: a model without a text", "evaluate base", ("text",)),
        ("evaluate: responses and a run", "evaluate run --responses responses.jsonl", ("--responses",)),
        (
            "evaluate: responses that are not there",
            "evaluate --responses nothing.jsonl --ifeval-data ifeval.jsonl",
            ("nothing.jsonl",),
        ),
        ("evaluate: shots below none", "evaluate run --tasks loss --num-fewshot -1", ("fewshot",)),
        ("evaluate: the file of a task that is not there", "evaluate run --tasks mine.yaml", ("mine.yaml",)),
        ("generate: nothing at all", "generate", ("RUN",)),
        ("generate: no prompt", "generate run", ("prompt",)),
        ("generate: an empty prompt", "generate run --prompt ''", ("prompt",)),
        ("generate: a file that is not there", "generate run --prompt-file nothing.txt", ("nothing.txt",)),
        ("generate: a folder of prompts", "generate run --prompt-file full", ("full",)),
        ("generate: a run that is not there", "generate nothing --prompt a", ("nothing",)),
        ("generate: no tokens", "generate run --prompt a --max-new-tokens 0", ("max_new_tokens",)),
        ("generate: cold beyond zero", "generate run --prompt a --temperature -1", ("temperature",)),
        ("generate: heat that is no number", "generate run --prompt a --temperature nan", ("temperature",)),
        ("generate: the top 0", "generate run --prompt a --top-k 0", ("top_k",)),
        ("generate: a mass above one", "generate run --prompt a --top-p 1.5", ("top_p",)),
        ("generate: a seed below zero", "generate run --prompt a --seed -1", ("seed",)),
        ("generate: a seed beyond all", f"generate run --prompt a --seed {10**30}", ("seed",)),
        ("generate: a checkpoint with a slip", "generate run --prompt a --checkpoint bset", ("bset",)),
        ("generate: a device with a slip", "generate run --prompt a --device cdua", ("cdua",)),
        ("generate: a number for a path", "generate 7 --prompt a", ("7",)),
        ("chat: nothing at all", "chat", ("RUN",)),
        ("chat: a run that is not there", "chat nothing", ("nothing",)),
        ("chat: a run without a template", "chat run", ("template",)),
        ("chat: a checkpoint that is not there", "chat chatrun --checkpoint 99", ("99",)),
        ("chat: no tokens", "chat chatrun --max-new-tokens 0", ("max_new_tokens",)),
        ("chat: a mass of none", "chat chatrun --top-p 0", ("top_p",)),
        ("chat: a device that is not here", "chat chatrun --device cuda", ("cuda",)),
        ("serve: nothing at all", "serve", ("RUN",)),
        ("serve: a run that is not there", "serve nothing", ("nothing",)),
        ("serve: a port beyond all", "serve run --port 99999", ("99999",)),
        ("serve: a port below none", "serve run --port -1", ("-1",)),
        ("serve: a word for a port", "serve run --port http", ("--port",)),
        ("serve: a host that is none", "serve run --host 300.1.1.1", ("300.1.1.1",)),
        ("serve: a host with a space", "serve run --host 'my host'", ("my host",)),
        ("serve: a host with no letters", "serve run --host ''", ("host",)),
        ("serve: a name with no letters", "serve run --name ''", ("name",)),
        ("serve: heat that is no number", "serve run --temperature inf", ("temperature",)),
        ("serve: an origin that is none", "serve run --allow-origin 'not an origin'", ("not an origin",)),
        ("serve: a key that no header holds", "serve run --api-key 'schlüssel\n'", ("key",)),
        ("serve: a checkpoint that is not there", "serve run --checkpoint 99", ("99",)),
        ("export: nothing at all", "export", ("RUN",)),
        ("export: no format", "export run", ("--to",)),
        ("export: an unknown format", "export run --to onnx", ("onnx", "gguf")),
        ("export: an unknown type", "export run --to hf --dtype int3", ("int3",)),
        ("export: a type of another format", "export run --to hf --dtype q8_0", ("q8_0",)),
        ("export: an adapter of what has none", "export run --to adapter", ("adapter",)),
        ("export: an output that holds files", "export run --to hf --output full", ("full",)),
        ("export: an output that is a file", "export run --to hf --output text.txt", ("text.txt",)),
        ("export: an output below a file", "export run --to hf --output text.txt/out", ("text.txt",)),
        ("export: an output that is the run", "export run --to hf --output run", ("run",)),
        ("export: a run that is not there", "export nothing --to hf", ("nothing",)),
        ("export: a checkpoint that is not there", "export run --to hf --checkpoint 99", ("99",)),
        ("cards: an unknown card", "cards rtx-9999", ("rtx-9999",)),
        ("cards: a card to measure", "cards rtx-3060 --measure", ("rtx-3060",)),
        ("cards: no GPU to measure", "cards --measure", ("GPU",)),
        ("cards: nothing to share", "cards --contribute --json", ("run",)),
        ("cards: two cards", "cards rtx-3060 rtx-4090", ("rtx-4090",)),
        ("cards: an empty name", "cards ''", ("card",)),
        ("doctor: an unknown flag", "doctor --fast", ("--fast",)),
        ("doctor: a word", "doctor gpu", ("gpu",)),
        ("doctor: a value for a switch", "doctor --json=maybe", ("--json",)),
    ]
    return [Case(what, words, names=names) for what, words, names in rows]


def _data() -> list[Case]:
    def text(what: str, name: str, content: Content, *names: str) -> Case:
        words = f"prepare tiny.yaml --dataset {name}"
        return Case(f"prepare: {what}", words, files({name: content}), (name, *names))

    def chat(what: str, *rows: object, names: tuple[str, ...] = ("chats.jsonl",), verb: str = "prepare") -> Case:
        return Case(f"{verb}: {what}", f"{verb} chat.yaml", chats(*rows), names)

    good = turns(("user", "a"), ("assistant", "b"))
    parquet = "prepare tiny.yaml --dataset text.parquet"
    return [
        text("an empty text", "a.txt", "", "empty"),
        text("a text of one letter", "a.txt", "a"),
        text("a text that is no UTF-8", "a.txt", b"good " * 50 + b"\xff\xfe\xfa" + b" text" * 50, "UTF-8"),
        text("a text in UTF-16", "a.txt", ("the quick " * 90).encode("utf-16"), "UTF-16"),
        text("a picture", "a.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4),
        text("JSON lines with a broken one", "a.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n', "a.jsonl:2"),
        text("JSON lines without the column", "a.jsonl", '{"body": "a"}\n', "text"),
        text("JSON lines of numbers", "a.jsonl", "1\n2\n"),
        text("JSON lines of null texts", "a.jsonl", '{"text": null}\n', "null"),
        text("JSON of one object", "a.json", '{\n "text": "a"\n}\n'),
        text("JSON with a comma too many", "a.json", '[{"text": "a"},]'),
        text("JSON nested without end", "a.json", "[" * 100_000),
        text("a gzip that breaks off", "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:40]),
        text("a gzip that is none", "a.txt.gz", b"plain text"),
        text("a tar without a text", "a.tar", tar_of({"a.png": b"1"}), "txt"),
        text("a tar that is none", "a.tar", b"no archive" * 99),
        text("a Parquet file that is none", "a.parquet", b"PAR1 and no more"),
        Case("prepare: a Parquet file that breaks off", parquet, cut("text.parquet", 0.5), ("text.parquet",)),
        Case("prepare: a Parquet file without the column", f"{parquet} --text_column body", names=("body", "text")),
        Case("prepare: a text that is not there", "prepare tiny.yaml --dataset nothing.txt", names=("nothing.txt",)),
        Case("prepare: a folder without text", "prepare tiny.yaml --dataset run/checkpoints/step-000004/none"),
        Case("prepare: a pattern of nothing", "prepare tiny.yaml --dataset 'none/*.txt'", names=("none/*.txt",)),
        Case("prepare: a pattern that is none", "prepare tiny.yaml --dataset 'a**/b'", names=("a**/b",)),
        Case("prepare: a data set of the Hub", "prepare tiny.yaml --dataset nobody/nothing", names=("nobody/nothing",)),
        Case("prepare: a link to itself", "prepare tiny.yaml --dataset a.txt", linked("a.txt", "a.txt"), ("a.txt",)),
        Case("prepare: a link to nothing", "prepare tiny.yaml --dataset a.txt", linked("a.txt", "b.txt"), ("a.txt",)),
        Case("prepare: a name of 5,000 letters", f"prepare tiny.yaml --dataset {'a' * 5000}.txt"),
        Case(
            "prepare: a NUL in a name",
            "prepare bad.yaml",
            files({"bad.yaml": RECIPE.replace("text.txt", '"a\\0b.txt"')}),
        ),
        Case("train: a text shorter than a sequence", "train tiny.yaml", files({"text.txt": "ab"})),
        chat("no rows", names=()),
        chat("broken JSON", good, '{"messages": [', names=("chats.jsonl:2",)),
        chat("a row that is a list", good, [1, 2]),
        chat("a row without messages", good, {"text": "a"}),
        chat("messages that are no list", good, {"messages": "hello"}),
        chat("messages that are empty", {"messages": []}),
        chat("a message that is a text", good, {"messages": ["hello"]}),
        chat("a message without its role", good, {"messages": [{"content": "a"}]}),
        chat("a message without its content", good, {"messages": [{"role": "user"}, {"role": "assistant"}]}),
        chat("an unknown role", good, turns(("user", "a"), ("robot", "b")), names=("robot",)),
        chat("content that is a number", good, turns(("user", 3), ("assistant", 4))),
        chat("content that is null", good, turns(("user", "a"), ("assistant", None))),
        chat("no answer at all", turns(("user", "a"))),
        chat("answers that are empty", turns(("user", "a"), ("assistant", ""))),
        chat("two users in turn", good, turns(("user", "a"), ("user", "b"), ("assistant", "c")), verb="train"),
        chat("a key given twice", good, '{"messages": [], "messages": []}', names=("twice",)),
        chat("half a surrogate pair", good, '{"messages": [{"role": "user", "content": "\\ud800"}]}'),
        chat("numbers of too many digits", good, '{"messages": ' + "9" * 5000 + "}"),
        chat("conversations of another kind", {"conversations": [{"from": "a", "value": "b"}]}),
        chat("instructions without output", {"instruction": "do"}),
        chat("preferences", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        Case("prepare: chats in Latin-1", "prepare chat.yaml", files({"chats.jsonl": b'{"messages": "\xe9"}\n'})),
        Case(
            "train: binary chats", "train chat.yaml", files({"chats.jsonl": bytes(range(256)) * 40}), ("chats.jsonl",)
        ),
        Case(
            "prepare: chats in a Parquet file that breaks off",
            "prepare chat.yaml --dataset chats.parquet",
            cut("chats.parquet", 0.7),
            ("chats.parquet",),
        ),
        Case("prepare: text for chats", "prepare chat.yaml --dataset text.txt", names=("text.txt",)),
        Case("prepare: chats for text", "prepare tiny.yaml --dataset chats.jsonl", names=("chats.jsonl", "sft")),
        Case(
            "prepare: an unknown template",
            "prepare chat.yaml --chat_template nothing",
            names=("nothing",),
        ),
        Case(
            "prepare: a template that is broken",
            "prepare chat.yaml --chat_template t.jinja",
            files({"t.jinja": "{% for m in messages %}{{ m.content }"}),
            ("t.jinja",),
        ),
        Case(
            "prepare: a template that asks for what is not there",
            "prepare chat.yaml --chat_template t.jinja",
            files({"t.jinja": "{{ messages.nothing.more }}"}),
            ("t.jinja",),
        ),
        Case(
            "prepare: a template without end",
            "prepare chat.yaml --chat_template t.jinja",
            files({"t.jinja": "{% for i in range(10000000000) %}{% endfor %}"}),
        ),
        Case(
            "generate: prompts that are no UTF-8",
            "generate run --prompt-file prompts.txt",
            files({"prompts.txt": b"\xff\xfe"}),
            ("prompts.txt", "UTF-8"),
        ),
        Case("generate: stdin that is no UTF-8", "generate run", names=("standard input",), stdin=b"\xff\xfe\n"),
        Case(
            "generate: a file of no prompts",
            "generate run --prompt-file prompts.txt",
            files({"prompts.txt": "\n\n"}),
            ("prompt",),
        ),
        Case("chat: stdin that is no UTF-8", "chat chatrun", names=("standard input",), stdin=b"\xff\xfe\n"),
        *(
            Case(
                f"evaluate: {what}",
                "evaluate --tasks ifeval --responses responses.jsonl --ifeval-data ifeval.jsonl",
                files({name: content}),
                names,
            )
            for what, name, content, names in (
                ("responses that are broken", "responses.jsonl", '{"prompt": "a"\n', ("responses.jsonl",)),
                ("responses without a prompt", "responses.jsonl", '{"response": "a"}\n', ("responses.jsonl",)),
                ("responses to nothing asked", "responses.jsonl", '{"prompt": "x", "response": "a"}\n', ("prompt",)),
                ("responses that are none", "responses.jsonl", "", ("responses.jsonl",)),
                ("responses that are numbers", "responses.jsonl", '{"prompt": 1, "response": 2}\n', ("responses",)),
                ("responses in UTF-16", "responses.jsonl", '{"prompt": "a"}'.encode("utf-16"), ("responses.jsonl",)),
                ("prompts that are none", "ifeval.jsonl", "", ("ifeval.jsonl",)),
                ("prompts that are broken", "ifeval.jsonl", "{", ("ifeval.jsonl",)),
                ("prompts without instructions", "ifeval.jsonl", '{"key": 1, "prompt": "a"}\n', ("ifeval.jsonl",)),
            )
        ),
        Case(
            "evaluate: a text that is binary",
            "evaluate base --text a.txt",
            files({"a.txt": b"\0\1\2" * 99}),
            ("a.txt",),
        ),
        Case("evaluate: a text that is empty", "evaluate base --text a.txt", files({"a.txt": ""}), ("a.txt",)),
        Case("evaluate: a text that is a folder", "evaluate base --text full", names=("full",)),
    ]


# What says nothing of the folder, for it may come from elsewhere.
_NAMED = {"a config with a size below none": ("qwen3",), "a config with no layers": ()}


def _models() -> list[Case]:
    config, tensors, tokenizer = "base/config.json", "base/model.safetensors", "base/tokenizer.json"
    adapter = f"{LAST_CHAT}/adapter_config.json"
    uses = (
        "generate base --prompt a",
        "train chat.yaml",
        "plan chat.yaml",
        "serve base --port 0",
        "export base --to hf --output out",
        "evaluate base --text text.txt",
    )
    spoils: list[tuple[str, Spoil]] = [
        ("a config that breaks off", cut(config, 0.5)),
        ("a config that is empty", files({config: ""})),
        ("a config that is a list", files({config: "[1, 2]"})),
        ("a config that is binary", files({config: bytes(range(256))})),
        ("a config without its type", in_json(config, lambda c: c.pop("model_type"))),
        ("a config of an unknown type", in_json(config, lambda c: c.update(model_type="qwenn3"))),
        ("a config with a text for a number", in_json(config, lambda c: c.update(hidden_size="wide"))),
        ("a config with a size below none", in_json(config, lambda c: c.update(hidden_size=-32))),
        ("a config with no layers", in_json(config, lambda c: c.update(num_hidden_layers=0, layer_types=[]))),
        ("a config of another width", in_json(config, lambda c: c.update(hidden_size=64))),
        ("a config of other heads", in_json(config, lambda c: c.update(num_attention_heads=3))),
        ("a config with an unknown activation", in_json(config, lambda c: c.update(hidden_act="siluu"))),
        ("a config of another vocabulary", in_json(config, lambda c: c.update(vocab_size=300))),
        ("a config with null sizes", in_json(config, lambda c: c.update(vocab_size=None))),
        ("a config that is a folder", as_folder(config)),
        ("a config that is a link to itself", linked(config, "config.json")),
        ("no weights", files({tensors: None})),
        ("weights that are empty", files({tensors: ""})),
        ("weights that break off", cut(tensors, 0.6)),
        ("weights that are a web page", files({tensors: "<!DOCTYPE html><html>Not found</html>"})),
        ("weights that are a pointer", files({tensors: "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"})),
        ("weights with a broken header", flipped(tensors, 0.001)),
        ("weights whose header lies", files({tensors: struct.pack("<Q", 1 << 60) + b"{}"})),
        ("weights whose header is a list", files({tensors: header([1])})),
        ("weights of places that are none", files({tensors: header({"a": {"dtype": "F32", "shape": [9]}})})),
        ("weights of another model", weights(tensors, _others)),
        ("weights of other shapes", weights(tensors, _halved)),
        ("weights of which one is missing", weights(tensors, _without_one)),
        ("weights that are integers", weights(tensors, _as_integers)),
        ("weights that are no numbers", weights(tensors, _nan)),
        (
            "an index that names what is not there",
            both(
                files({tensors: None}),
                files({f"{tensors}.index.json": '{"weight_map": {"a": "model-00001.safetensors"}}'}),
            ),
        ),
        (
            "an index that leads outside",
            both(files({tensors: None}), files({f"{tensors}.index.json": '{"weight_map": {"a": "../../etc/passwd"}}'})),
        ),
        ("no tokenizer", both(files({tokenizer: None}), files({"base/tokenizer_config.json": None}))),
        ("a tokenizer that breaks off", cut(tokenizer, 0.7)),
        ("a tokenizer that is empty", files({tokenizer: ""})),
        ("a tokenizer of nothing", files({tokenizer: "{}"})),
        ("a tokenizer that is a list", files({tokenizer: "[]"})),
        ("a tokenizer of an unknown kind", in_json(tokenizer, lambda t: t["model"].update(type="Magic"))),
        (
            "a tokenizer of other ids",
            in_json(tokenizer, lambda t: t["model"].update(vocab=_moved(t["model"]["vocab"]))),
        ),
        ("tokenizer settings that are broken", cut("base/tokenizer_config.json", 0.5)),
        ("tokenizer settings that are a list", files({"base/tokenizer_config.json": "[]"})),
    ]
    found = []
    for number, (what, spoil) in enumerate(spoils):
        # Every mistake to two commands, so that each command meets a third of them.
        chosen = {uses[number % len(uses)], uses[(number * 5 + 1 + number // len(uses)) % len(uses)]}
        if "tokenizer" in what:
            chosen = chosen - {"plan chat.yaml"} or {uses[0]}
        found += [
            Case(f"{words.split()[0]}: {what}", words, spoil, _NAMED.get(what, ("base",))) for words in sorted(chosen)
        ]
    chat = "chat chatrun"
    unsealed = files({f"{LAST_CHAT}/manifest.json": None})
    model = f"chat {LAST_CHAT}"
    return [
        *found,
        Case("generate: a folder that is no model", "generate full --prompt a", names=("full",)),
        Case("generate: a file that is no model", "generate text.txt --prompt a", names=("text.txt",)),
        Case("train: a model that is not there", "train chat.yaml --model_name_or_path ./no", names=("./no",)),
        Case("train: a model of the Hub, offline", "train chat.yaml --model_name_or_path gpt2-no", names=("gpt2-no",)),
        Case("train: LoRA on no layer", "train chat.yaml --lora_target_modules nothing", names=("nothing",)),
        Case("plan: longer than the model", "plan chat.yaml --max_seq_length 4096", names=("4096",)),
        Case("chat: a base that is gone", chat, files({"base": None}), ("base",)),
        Case("serve: a base that is gone", "serve chatrun --port 0", files({"base": None}), ("base",)),
        Case("export: a base that is gone", "export chatrun --to merged", files({"base": None}), ("base",)),
        Case(
            "chat: a base that is another",
            chat,
            weights(tensors, lambda t: {n: v + 1 for n, v in t.items()}),
            ("base",),
        ),
        Case("chat: an adapter that was changed", chat, flipped(f"{LAST_CHAT}/adapter_model.safetensors", 0.9)),
        Case(
            "chat: an adapter that breaks off",
            model,
            both(unsealed, cut(f"{LAST_CHAT}/adapter_model.safetensors", 0.5)),
        ),
        Case(
            "chat: an adapter without weights",
            model,
            both(unsealed, files({f"{LAST_CHAT}/adapter_model.safetensors": None})),
        ),
        Case(
            "chat: an adapter of an unknown kind",
            model,
            both(unsealed, in_json(adapter, lambda c: c.update(peft_type="LOL"))),
        ),
        Case("chat: an adapter of another rank", model, both(unsealed, in_json(adapter, lambda c: c.update(r=16)))),
        Case(
            "chat: an adapter of no base",
            model,
            both(unsealed, in_json(adapter, lambda c: c.update(base_model_name_or_path=None))),
        ),
        Case(
            "chat: a template that is broken",
            model,
            both(unsealed, files({f"{LAST_CHAT}/chat_template.jinja": "{% for %}"})),
        ),
        Case(
            "generate: a template that is broken",
            f"generate {LAST_CHAT} --prompt a",
            both(unsealed, files({f"{LAST_CHAT}/chat_template.jinja": "{{ messages.x.y }}"})),
        ),
        Case(
            "serve: a template that is broken",
            f"serve {LAST_CHAT} --port 0",
            both(unsealed, files({f"{LAST_CHAT}/chat_template.jinja": "{% for %}"})),
        ),
        Case(
            "export: a format of a file of Ollama", "export base --to gguf --dtype bf16 --output full", names=("full",)
        ),
    ]


def _runs() -> list[Case]:
    def every(what: str, spoil: Spoil, verbs: str, *names: str) -> list[Case]:
        words = {
            "resume": "resume run",
            "verify": "resume run --verify 2",
            "report": "report run",
            "monitor": "monitor run --once",
            "compare": "compare run chatrun",
            "replay": "replay run --step 3",
            "evaluate": "evaluate run",
            "generate": "generate run --prompt a",
            "serve": "serve run --port 0",
            "export": "export run --to hf",
            "explain": "plan --explain run",
        }
        return [Case(f"{words[verb].split()[0]}: {what}", words[verb], spoil, names) for verb in verbs.split()]

    readers = "report compare replay evaluate explain monitor"
    both_lost = both(*(files({f"run/checkpoints/step-{step:06d}/model.safetensors": "x"}) for step in (2, 4)))
    return [
        *every("a plan that breaks off", cut("run/plan.json", 0.5), f"{readers} verify", "plan.json"),
        *every("a plan of nothing", files({"run/plan.json": "{}"}), "explain monitor", "plan.json"),
        *every("a plan that is binary", files({"run/plan.json": bytes(range(256))}), "explain report", "plan.json"),
        *every(
            "a plan with a text for a number",
            edited("run/plan.json", '"max_seq_length": 64', '"max_seq_length": "x"'),
            "explain compare",
            "plan.json",
        ),
        *every("no plan", files({"run/plan.json": None}), "resume report generate export explain", "run"),
        *every("no recipe", files({"run/recipe.yaml": None}), "resume replay evaluate", "run"),
        *every("a recipe that is broken", files({"run/recipe.yaml": "dataset: [\n"}), "resume replay", "recipe.yaml"),
        *every(
            "a recipe with a slip", edited("run/recipe.yaml", "max_steps:", "max_step:"), "resume replay", "max_step"
        ),
        *every(
            "a recipe that was changed", edited("run/recipe.yaml", "max_seq_length: 64", "max_seq_length: 32"), "resume"
        ),
        *every(
            "a record that is binary",
            files({"run/events.jsonl": bytes(range(256)) * 20}),
            "report replay monitor compare",
            "events.jsonl",
        ),
        *every(
            "a record of numbers", files({"run/events.jsonl": "1\n2\n3\n"}), "report replay monitor", "events.jsonl"
        ),
        *every(
            "a record that is a folder", as_folder("run/events.jsonl"), "report replay monitor compare", "events.jsonl"
        ),
        *every("no record", files({"run/events.jsonl": None}), "replay verify", "run"),
        *every("text that has changed", edited("text.txt", " ", " other words "), "resume replay verify", "text"),
        *every("text that is gone", files({"text.txt": None}), "resume replay", "text.txt"),
        *every(
            "no checkpoints",
            files({"run/checkpoints": None}),
            "resume evaluate generate serve export verify",
            "checkpoint",
        ),
        *every(
            "checkpoints that are a file",
            both(files({"run/checkpoints": None}), files({"run/checkpoints": "x"})),
            "evaluate generate",
            "run",
        ),
        *every(
            "checkpoints that are all damaged",
            both_lost,
            "resume evaluate generate serve export verify",
            "model.safetensors",
        ),
        *every(
            "a checkpoint of a later version",
            in_json(f"{LAST}/manifest.json", lambda m: m.update(format_version=99)),
            "generate export evaluate",
            "99",
        ),
        *every(
            "a manifest that is broken",
            cut(f"{LAST}/manifest.json", 0.5),
            "generate serve export evaluate",
            "manifest.json",
        ),
        *every(
            "a manifest of other files",
            in_json(f"{LAST}/manifest.json", lambda m: m["files"].clear()),
            "generate",
            "manifest.json",
        ),
        *every(
            "a manifest that leads outside",
            in_json(
                f"{LAST}/manifest.json", lambda m: m["files"].update({"../../../x": {"num_bytes": 1, "sha256": "0"}})
            ),
            "generate export",
        ),
        *every(
            "progress that is broken", files({f"{LAST}/progress.json": "{"}), "generate export serve", "step-000004"
        ),
        *every(
            "weights that were changed",
            flipped(f"{LAST}/model.safetensors", 0.8),
            "generate serve export evaluate",
            "model.safetensors",
        ),
        *every("a run that is a link to itself", linked("run", "run"), "resume report generate", "run"),
        Case(
            "resume: a named checkpoint that is damaged",
            f"resume {LAST}",
            flipped(f"{LAST}/optimizer.safetensors", 0.8),
            ("optimizer.safetensors",),
        ),
        Case(
            "resume: a run of another vocabulary",
            "resume chatrun",
            in_json("base/config.json", lambda c: c.update(vocab_size=300)),
        ),
        Case("resume: a base that is gone", "resume chatrun", files({"base": None}), ("base",)),
        Case(
            "resume: a base that is another",
            "resume chatrun",
            weights("base/model.safetensors", lambda t: {n: v + 1 for n, v in t.items()}),
            ("base",),
        ),
        Case(
            "resume: chats that have changed",
            "resume chatrun",
            chats(*(turns(("user", "x"), ("assistant", str(n))) for n in range(9))),
            ("chats",),
        ),
        Case("report: a page that is a folder", "report run", as_folder("run/report.html"), ("report.html",)),
        Case("cards: local rows that are broken", "cards", files({"home/cards.toml": "[card\n"}), ("cards.toml",)),
        Case("cards: local rows with a slip", "cards", files({"home/cards.toml": "[mine]\nnam = 'x'\n"}), ("mine",)),
        Case(
            "cards: local rows that are binary", "cards", files({"home/cards.toml": bytes(range(256))}), ("cards.toml",)
        ),
        Case("cards: local rows that are a folder", "cards rtx-3060", as_folder("home/cards.toml"), ("cards.toml",)),
        Case("cards: local rows of numbers", "cards", files({"home/cards.toml": "mine = 3\n"}), ("mine",)),
        Case(
            "plan: local rows that are broken",
            "plan tiny.yaml --card rtx-3060",
            files({"home/cards.toml": "="}),
            ("cards.toml",),
        ),
        Case("cards: outcomes that are broken", "cards --contribute", files({"home/outcomes.jsonl": "{\n"})),
    ]


def _trials() -> list[Case]:
    """Commands that try a recipe out: what they are given is refused before anything is tried."""
    both = [
        ("a recipe that is not there", "nothing.yaml", ("nothing",)),
        ("a folder for a recipe", "full", ("full",)),
        ("a data file for a recipe", "chats.jsonl", ("chats.jsonl",)),
        ("a model for a recipe", "base/model.safetensors", ("model.safetensors",)),
        ("an unknown flag", "tiny.yaml --fast yes", ("fast",)),
        ("a rate in words", "tiny.yaml --learning_rate fast", ("learning_rate", "fast")),
        ("a text that is not there", "tiny.yaml --dataset nothing.txt", ("nothing.txt",)),
        ("no minutes", "tiny.yaml --minutes 0", ("minutes",)),
        ("minutes below none", "tiny.yaml --minutes -1", ("minutes",)),
        ("minutes that are no number", "tiny.yaml --minutes nan", ("minutes",)),
        ("minutes in words", "tiny.yaml --minutes soon", ("minutes",)),
        ("two recipes", "tiny.yaml chat.yaml", ("chat.yaml",)),
    ]
    bench = [
        ("a sweep without values", "tiny.yaml --sweep seed=", ("seed",)),
        ("a sweep without a key", "tiny.yaml --sweep =1,2", ("sweep",)),
        ("a sweep over an unknown key", "tiny.yaml --sweep sede=1,2", ("sede",)),
        ("a sweep over words", "tiny.yaml --sweep seed=one,two", ("seed", "one")),
        ("a value twice", "tiny.yaml --sweep seed=1,1", ("seed",)),
        ("a key swept twice", "tiny.yaml --sweep seed=1,2 --sweep seed=3", ("seed",)),
        ("a flag that is swept, too", "tiny.yaml --seed 3 --sweep seed=1,2", ("seed",)),
        ("a sweep over the name", "tiny.yaml --sweep run_name=a,b", ("run_name",)),
        ("too many settings", f"tiny.yaml --sweep seed={','.join(map(str, range(99)))}", ("99",)),
        ("a page that is there", "tiny.yaml --page text.txt", ("text.txt",)),
    ]
    find_lr = [
        ("a folder that holds files", "tiny.yaml --output-dir full", ("full",)),
        ("a folder that is a file", "tiny.yaml --output-dir text.txt", ("text.txt",)),
        ("nothing held out", "tiny.yaml --eval_fraction 0", ("held",)),
        ("too few minutes", "tiny.yaml --minutes 1e-9", ("minutes",)),
    ]
    groups = {"bench": both + bench, "find-lr": both + find_lr}
    found = [
        Case(f"{verb}: {what}", f"{verb} {words}", names=names)
        for verb, cases in groups.items()
        for what, words, names in cases
    ]
    for verb in groups:
        found += [
            Case(
                f"{verb}: a recipe that is no YAML", f"{verb} tiny.yaml", files({"tiny.yaml": "a: [\n"}), ("tiny.yaml",)
            ),
            Case(f"{verb}: a text that is empty", f"{verb} tiny.yaml", files({"text.txt": ""}), ("text.txt",)),
            Case(f"{verb}: a base that is broken", f"{verb} chat.yaml", cut("base/model.safetensors", 0.5), ("base",)),
        ]
    return found


CASES = (*_recipes(), *_flags(), *_data(), *_models(), *_runs(), *_trials())
