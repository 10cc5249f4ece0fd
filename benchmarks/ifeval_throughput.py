"""Generation for IFEval's prompts beside lm-evaluation-harness's own Hugging Face backend at its best batch size.

python benchmarks/ifeval_throughput.py PROMPTS.jsonl FOLDER [--limit 48] [--new 128] [--device cpu|cuda] [--name NAME]

FOLDER holds a trained model, or a tokenizer alone: then a random Llama is made for it, whose texts run to the limit
unless `--end-bias` lifts the end of text. Prompts go through the chat template of a trained model, and those that leave
less than `--new` of its positions are passed over. The same model object, prompts, greedy choice, fp32 and limit on
both sides; they take turns, and each ratio is of the least of several rounds. Texts that agree but for spaces around
them are counted: the harness keeps one before an end.
On a CPU, `cpu_s` is the time of all threads: the figure to read on a machine that does other things, too.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from record import write_result
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from onecard.evaluation.responses import respond
from onecard.evaluation.task import Subject

# Of SmolLM2-135M on a GPU; on a CPU small enough for a minute.
SHAPES = {
    "cpu": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4},
    "cuda": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
}
MLP_WIDTHS = {"cpu": 688, "cuda": 1536}
BATCH_SIZES = {"cpu": (8, 16, 32, 64), "cuda": (64, 128, 256, 541)}


def build(folder: str, device: str, end_bias: float) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama; `end_bias` lifts the end of text, so that texts end at different lengths as those of chats do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    if tokenizer.eos_token is None:  # a folder of a vocabulary alone
        word = next(word for word in ("</s>", "<|endoftext|>") if word in tokenizer.get_vocab())
        tokenizer.add_special_tokens({"eos_token": word})
    tokenizer.pad_token = tokenizer.eos_token
    settings = SHAPES[device] | {"intermediate_size": MLP_WIDTHS[device], "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(
        "llama", **settings, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.1
    )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
    if end_bias:
        with torch.no_grad():
            weight = model.get_output_embeddings().weight
            weight[tokenizer.eos_token_id] *= end_bias
    return model, tokenizer


def load(folder: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return model, tokenizer


def read_prompts(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_new: int) -> list[str]:
    prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    longest = model.config.max_position_embeddings - num_new - 2
    return [prompt for prompt in prompts if len(tokenizer(rendered(tokenizer, prompt))["input_ids"]) <= longest]


def rendered(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    turn = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--end-bias", type=float, default=0.0)
    parser.add_argument("--theirs", type=int, nargs="*", help="batch sizes of the harness")
    parser.add_argument("--ours", type=int, nargs="*", help="texts at once")
    parser.add_argument("--name", default="", help="ends the name of the file of results")
    args = parser.parse_args()
    if (args.folder / "config.json").exists():
        model, tokenizer = load(str(args.folder), args.device)
    else:
        model, tokenizer = build(str(args.folder), args.device, args.end_bias)
    prompts = read_prompts(args.prompts, model, tokenizer, args.new)[: args.limit]
    sizes = [size for size in BATCH_SIZES[args.device] if size < 2 * len(prompts)]
    sides: dict[str, Callable[[], list[str]]] = {}
    for size in args.theirs or sizes:
        sides[f"harness {size}"] = harness(model, tokenizer, prompts, args.new, size)
    for size in args.ours or sizes:
        sides[f"onecard {size}"] = ours(model, tokenizer, prompts, args.new, size)
    rows, texts = take_turns(sides, args.rounds)
    report(args, model, rows, texts, tokenizer)


def harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], num_new: int, size: int
) -> Callable[[], list[str]]:
    backend = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=model.config.max_position_embeddings
    )
    arguments: dict[str, Any] = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": num_new}
    requests = [
        Instance("generate_until", {}, (rendered(tokenizer, prompt), dict(arguments)), index)
        for index, prompt in enumerate(prompts)
    ]
    return lambda: [str(text) for text in backend.generate_until(requests, disable_tqdm=True)]


def ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], num_new: int, size: int
) -> Callable[[], list[str]]:
    return lambda: list(respond(Subject(model, tokenizer, {}), prompts, num_new, size).texts)


def take_turns(
    sides: dict[str, Callable[[], list[str]]], num_rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    rows: dict[str, dict[str, Any]] = {name: {"seconds": [], "cpu_s": []} for name in sides}
    texts: dict[str, list[str]] = {}
    for number in range(num_rounds):
        for name, run in sides.items():
            started, cpu = time.perf_counter(), time.process_time()
            texts[name] = run()
            rows[name]["seconds"].append(round(time.perf_counter() - started, 2))
            rows[name]["cpu_s"].append(round(time.process_time() - cpu, 2))
            print(number, name, rows[name]["seconds"][-1], rows[name]["cpu_s"][-1], flush=True)
    return rows, texts


def report(
    args: argparse.Namespace,
    model: PreTrainedModel,
    rows: dict[str, dict[str, Any]],
    texts: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    def best(side: str, key: str) -> tuple[float, str]:
        return min((min(row[key]), name) for name, row in rows.items() if name.startswith(side))

    first = texts[next(name for name in texts if name.startswith("onecard"))]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in first]
    result = {
        "num_prompts": len(first),
        "max_new_tokens": args.new,
        "shape": {key: getattr(model.config, key) for key in (*SHAPES["cpu"], "vocab_size")},
        "num_parameters": model.num_parameters(),
        "end_bias": args.end_bias,
        "num_new_tokens_about": sum(lengths),
        "num_at_limit_about": sum(length >= args.new - 1 for length in lengths),
        "num_threads": torch.get_num_threads(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "rows": rows,
        "same_texts": {
            name: sum(a.strip() == b.strip() for a, b in zip(found, first, strict=True))
            for name, found in texts.items()
        },
    }
    for key in ("seconds", "cpu_s"):
        theirs, own = best("harness", key), best("onecard", key)
        result[f"ratio_{key}"] = round(theirs[0] / own[0], 2)
        result[f"best_{key}"] = {"harness": theirs[1], "onecard": own[1]}
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))
    name = args.name or ("ends" if args.end_bias else "")
    write_result(f"ifeval_throughput_{args.device}{'_' * bool(name)}{name}", result)


if __name__ == "__main__":
    main()
