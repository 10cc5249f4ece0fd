"""A tiny pretrained model learns 100 chats by heart with each method, and `onecard generate` answers them.

The model is stories260K of llama2.c in Hugging Face form, with its own vocabulary `tok512.bin` beside it. Of each
method it is told how many of the 100 answers the best checkpoint repeats, letter for letter, by greedy choice.

    python benchmarks/by_heart.py path/to/stories260K
"""

import argparse
import json
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write_result

import onecard

NAMES = ("Tom", "Lily", "Ben", "Sue", "Max", "Anna", "Tim", "Mia", "Sam", "Lucy")
THINGS = ("ball", "hat", "dog", "cake", "car", "book", "bird", "tree", "toy", "cup")
PLACES = ("park", "garden", "house", "school", "forest", "kitchen", "shop")
DEEDS = ("lost", "found", "drew", "washed", "hid", "saw", "carried", "painted", "dropped", "sold", "kept")
# Steps and rates at which each was seen to learn all of them (adapters at 1e-2: 31 of 100 and fewer).
METHODS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 3e-3, "max_steps": 300},
    "lora": {"learning_rate": 3e-3, "max_steps": 400, "lora_r": 32, "lora_alpha": 64},
    "qlora": {"learning_rate": 3e-3, "max_steps": 400, "lora_r": 32, "lora_alpha": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of stories260K")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    chats = make_chats()
    with tempfile.TemporaryDirectory() as folder:
        base = copy_with_tokenizer(arguments.model, Path(folder) / "base")
        file = Path(folder) / "chats.jsonl"
        file.write_text("".join(json.dumps({"messages": turns(*chat)}) + "\n" for chat in chats), encoding="utf-8")
        result = {method: learn(method, base, file, chats) for method in arguments.methods}
    write_result("by_heart", {"num_chats": len(chats), "methods": result})


def make_chats() -> list[tuple[str, str]]:
    """Questions with answers that do not follow from them."""
    chats = []
    for number, (name, thing) in enumerate((name, thing) for name in NAMES for thing in THINGS):
        deed, place = DEEDS[number * 7 % len(DEEDS)], PLACES[number * 5 % len(PLACES)]
        chats.append((f"What did {name} do with the {thing}?", f"{name} {deed} the {thing} in the {place}."))
    return chats


def turns(question: str, answer: str) -> list[dict[str, str]]:
    """A chat as rows of chat files have it."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def learn(method: str, base: Path, file: Path, chats: list[tuple[str, str]]) -> dict[str, Any]:
    """Trains by one method and asks all questions."""
    started, last = time.perf_counter(), {}

    def watch(event: Any) -> None:
        if event.event == "step":
            last["loss"] = event.loss

    with tempfile.TemporaryDirectory() as folder:
        recipe = onecard.load_recipe(
            model_name_or_path=str(base),
            task="sft",
            method=method,
            dataset=str(file),
            eval_fraction=0,
            total_batch_size=25,
            max_seq_length=128,
            precision="fp32",
            report_to="none",
            save_steps=0,
            lr_scheduler_type="cosine",
            **METHODS[method],
        )
        run = onecard.train(recipe, output_dir=Path(folder) / "run", on_event=watch)
        answers = onecard.generate(run, [question for question, _ in chats], temperature=0, max_new_tokens=60)
    num_right = sum(found == wanted for found, (_, wanted) in zip(answers, chats, strict=True))
    seconds = time.perf_counter() - started
    print(f"{method}: {num_right} of {len(chats)} answers, loss {last['loss']:.4f}, {seconds:.0f} s")
    wrong = [(wanted, found) for found, (_, wanted) in zip(answers, chats, strict=True) if found != wanted]
    return {"num_right": num_right, "loss": last["loss"], "seconds": seconds, "wrong": wrong[:3]}


def copy_with_tokenizer(model: Path, folder: Path) -> Path:
    """Copies the model beside a tokenizer.json made of its `tok512.bin`."""
    from transformers import LlamaTokenizerFast

    shutil.copytree(model, folder)
    pieces = read_pieces(folder / "tok512.bin")
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
    rank = dict(pieces)
    found = [
        (rank[piece], piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary and vocabulary[piece] > 258
    ]
    merges = [(left, right) for _, left, right in sorted(found, key=lambda entry: -entry[0])]
    # Its training had <s> between stories. </s> has the vector of all that never occurred: no adapter could tell it.
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<s>"}
    tokenizer = LlamaTokenizerFast(vocab=vocabulary, merges=merges, **names)
    tokenizer.save_pretrained(folder)
    return folder


def read_pieces(file: Path) -> list[tuple[str, float]]:
    """Reads llama2.c's vocabulary: the longest piece, then score, length and bytes of each."""
    content = file.read_bytes()
    place, pieces = 4, []
    while place < len(content):
        score, length = struct.unpack_from("<fi", content, place)
        text = content[place + 8 : place + 8 + length].decode("utf-8")
        pieces.append((text, score))
        place += 8 + length
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return [(name, 0.0) for name in named] + [(text.replace(" ", "▁"), score) for text, score in pieces[259:]]


if __name__ == "__main__":
    main()
