"""Published responses to IFEval with published verdicts, scored again.

python benchmarks/ifeval_published.py PROMPTS.jsonl eval_results_strict.jsonl … [--gpt4 input_response_data_gpt4.jsonl]

Beside each `…strict…` file lies its `…loose…`, both as Google's `evaluation_main.py` writes them: prompt, response and
`follow_instruction_list`. A verdict in dispute is one on which the harness, unseeded as it comes, disagrees with itself
over `--draws` runs: it draws a letter where a prompt names none, and guesses languages by chance. The scores of each
file are computed by two processes with other hash seeds, and compared to the digit. `--gpt4` takes Google's own file,
whose four accuracies are in the paper (arXiv 2311.07911, table 3).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import write_result

from onecard.evaluation.ifeval import Checker, read_jsonl, read_prompts

LEVELS = ("strict", "loose")
# Per cent.
PAPER = {
    "prompt_level_strict_acc": 76.89,
    "inst_level_strict_acc": 83.57,
    "prompt_level_loose_acc": 79.30,
    "inst_level_loose_acc": 85.37,
}
# Prompt, instruction and level: what a verdict is of.
Place = tuple[str, int, str]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", type=Path)
    parser.add_argument("published", type=Path, nargs="*")
    parser.add_argument("--gpt4", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    args = parser.parse_args()
    prompts = {row["prompt"]: row for row in read_prompts(args.prompts)}
    files = [published_verdicts(path, prompts) for path in args.published]
    checker = Checker()
    rows = {}
    for path, (responses, told) in zip(args.published, files, strict=True):
        seen = harness_range(responses, prompts, args.draws)
        rows[path.name] = compare(responses, told, seen, prompts, checker) | {"scores": twice(responses, args.prompts)}
    result: dict[str, Any] = {"num_draws": args.draws, "versions": checker.versions, "rows": rows}
    if args.gpt4 is not None:
        found = read_jsonl(args.gpt4, "--gpt4")
        responses = {row["prompt"]: row["response"] for row in found if row["prompt"] in prompts}
        result["gpt4"] = {"num_responses": len(responses), "scores": twice(responses, args.prompts), "paper": PAPER}
    print(json.dumps(result, indent=1))
    write_result("ifeval_published", result)


def published_verdicts(path: Path, prompts: dict[str, Any]) -> tuple[dict[str, str], dict[Place, bool]]:
    responses, told = {}, {}
    for level in LEVELS:
        rows = read_jsonl(path.with_name(path.name.replace("strict", level)), level)
        # One of Google's prompts was changed after some of the responses were written.
        for row in (row for row in rows if row["prompt"] in prompts):
            assert row["instruction_id_list"] == prompts[row["prompt"]]["instruction_id_list"]
            assert responses.setdefault(row["prompt"], row["response"]) == row["response"]
            for index, verdict in enumerate(row["follow_instruction_list"]):
                told[row["prompt"], index, level] = verdict
    return responses, told


def harness_range(responses: dict[str, str], prompts: dict[str, Any], num_draws: int) -> dict[Place, set[bool]]:
    import langdetect
    from lm_eval.tasks.ifeval import utils

    # As it is where nobody seeds it.
    langdetect.DetectorFactory.seed = None
    random.seed()
    seen: dict[Place, set[bool]] = {}
    for _ in range(num_draws):
        for prompt, response in responses.items():
            found = utils.process_results(prompts[prompt], [response])
            for place, verdict in places(prompt, [found[f"inst_level_{level}_acc"] for level in LEVELS]):
                seen.setdefault(place, set()).add(verdict)
    langdetect.DetectorFactory.seed = 0
    return seen


def places(prompt: str, verdicts: list[Any]) -> Iterator[tuple[Place, bool]]:
    for level, followed in zip(LEVELS, verdicts, strict=True):
        for index, verdict in enumerate(followed):
            yield (prompt, index, level), bool(verdict)


def compare(
    responses: dict[str, str],
    told: dict[Place, bool],
    seen: dict[Place, set[bool]],
    prompts: dict[str, Any],
    checker: Checker,
) -> dict[str, Any]:
    own: dict[Place, bool] = {}
    for prompt, response in responses.items():
        verdict = checker.judge(prompts[prompt], response)
        own.update(places(prompt, [verdict.strict, verdict.loose]))
    disputed = {place for place, verdicts in seen.items() if len(verdicts) > 1}
    differ = [place for place in told if own[place] != told[place]]

    def name(place: Place) -> list[Any]:
        row = prompts[place[0]]
        return [row["key"], row["instruction_id_list"][place[1]], place[2]]

    return {
        "num_responses": len(responses),
        "num_verdicts": len(told),
        "num_kinds": len({kind for prompt in responses for kind in prompts[prompt]["instruction_id_list"]}),
        "num_followed": sum(own.values()),
        "differ_from_published": [name(place) for place in differ],
        "of_these_beyond_the_harness": [name(place) for place in differ if place not in disputed],
        "differ_from_settled_harness": [name(p) for p in seen if p not in disputed and own[p] not in seen[p]],
        "harness_disagrees_with_itself": [name(place) for place in disputed],
    }


def twice(responses: dict[str, str], prompts: Path) -> dict[str, float]:
    """The four accuracies by the command; stops where two processes differ in any digit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "responses.jsonl"
        lines = [json.dumps({"prompt": prompt, "response": text}) + "\n" for prompt, text in responses.items()]
        file.write_text("".join(lines), encoding="utf-8")
        words = ["-m", "onecard", "evaluate", "--responses", str(file), "--ifeval_data", str(prompts), "--json"]
        outputs = [
            subprocess.run(
                [sys.executable, *words],
                env=os.environ | {"PYTHONHASHSEED": seed},
                capture_output=True,
                check=True,
                encoding="utf-8",
            ).stdout
            for seed in ("1", "2")
        ]
    assert outputs[0] == outputs[1], "two runs differ"
    document = json.loads(outputs[0])
    return {score["name"]: score["value"] for score in document["checkpoints"][0]["scores"]}


if __name__ == "__main__":
    main()
