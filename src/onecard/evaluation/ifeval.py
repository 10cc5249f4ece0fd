"""IFEval (arXiv 2311.07911): instructions that a program can check, judged by the scorer of lm-evaluation-harness.

What is ours is around it: prompts and responses are read and tried out before anything is generated, and the verdicts
are the same each time.
"""

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from onecard.errors import DataError, InputError
from onecard.evaluation.paired import Items
from onecard.spec.score import Protocol, Score

# The four accuracies, by the harness's names.
PROMPT_STRICT, PROMPT_LOOSE = "prompt_level_strict_acc", "prompt_level_loose_acc"
INSTRUCTION_STRICT, INSTRUCTION_LOOSE = "inst_level_strict_acc", "inst_level_loose_acc"
# What published scores are of: so many prompts, and so many tokens of each response.
STANDARD_PROMPTS, STANDARD_TOKENS = 541, 1280
_PACKAGES = ("lm_eval", "langdetect", "immutabledict", "nltk")
_FIELDS = {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list}
# Of what is wrong with a file, how much is told.
_NUM_TOLD = 5


@dataclass(frozen=True)
class Verdict:
    """Which instructions of a prompt a response follows, taken literally and with a start or end line forgiven."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def read_prompts(path: Path | None) -> list[dict[str, Any]]:
    """Reads prompts with their instructions from a JSONL file as Google published it, or from the Hub's google/IFEval.

    Raises:
        DataError: no such file, or lines that are no prompts, told together.
    """
    rows: list[Any] = read_jsonl(path, "--ifeval_data") if path is not None else _from_hub()
    problems = [f"line {number}: {problem}" for number, row in enumerate(rows, 1) if (problem := _problem_of(row))]
    if problems:
        source = path or "google/IFEval"
        raise DataError(_told(f"{source} holds no IFEval prompts: give its own input_data.jsonl", problems))
    return rows


def read_jsonl(path: Path, flag: str) -> list[Any]:
    """Reads one JSON value per line; empty lines are passed over.

    Raises:
        DataError: it cannot be read, or holds nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON may hold U+2028
        rows = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise DataError(f"{flag} {path}: it cannot be read ({error.strerror or error}): check the path") from error
    except ValueError as error:
        raise DataError(
            f"{flag} {path}: it is no JSON Lines file in UTF-8 ({error}): give one object per line"
        ) from error
    if not rows:
        raise DataError(f"{flag} {path}: it is empty: give one object per line")
    return rows


def match_responses(path: Path, prompts: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Reads a file with a prompt and its response per line, and gives each prompt that has one with it.

    Raises:
        DataError: lines without both, prompts that are not among `prompts`, or two responses to one.
    """
    known = {row["prompt"]: row for row in prompts}
    found: dict[str, str] = {}
    problems = []
    for number, row in enumerate(read_jsonl(path, "--responses"), 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
            problems.append(f'line {number}: it takes two texts, {{"prompt": …, "response": …}}')
        elif row["prompt"] not in known:
            problems.append(
                f"line {number}: this prompt is not one of the data, to the letter: {row['prompt'][:60]!r}: leave the "
                "line out, or name the prompts it answers by --ifeval_data"
            )
        elif row["prompt"] in found:
            problems.append(f"line {number}: a second response to {row['prompt'][:60]!r}")
        else:
            found[row["prompt"]] = row["response"]
    if problems:
        raise DataError(_told(f"{path} cannot be scored", problems))
    return [(row, found[row["prompt"]]) for row in prompts if row["prompt"] in found]


class Checker:
    """The scorer of lm-evaluation-harness, made deterministic. Needs the extra `eval`.

    Raises:
        InputError: it is not installed, or the sentence splitter's data is not on this machine.
    """

    def __init__(self) -> None:
        missing = [name for name in _PACKAGES if find_spec(name) is None]
        if missing:
            raise InputError(
                f"ifeval is scored by lm-evaluation-harness, but {', '.join(missing)} cannot be imported: install the "
                "extra with pip install 'onecard[eval]'"
            )
        _check_splitter()  # before the import below, which would try to download it and go on without
        import langdetect
        from lm_eval.tasks.ifeval import utils

        # Unseeded, it calls one short text Spanish or Catalan by chance (lm-evaluation-harness issue 4213).
        langdetect.DetectorFactory.seed = 0
        self._process: Callable[[Mapping[str, Any], list[str]], dict[str, Any]] = utils.process_results
        self.versions: Protocol = {name: version(name) for name in _PACKAGES}

    def try_out(self, prompts: Sequence[dict[str, Any]]) -> None:
        """Judges a word on each prompt, so that what cannot be scored is known before anything is generated.

        Raises:
            DataError: unknown instructions, or arguments they do not take, told together.
        """
        problems = []
        for row in prompts:
            try:
                self.judge(row, "word")
            # The checkers raise whatever an argument makes them stumble over.
            except Exception as error:
                problems.append(f"prompt {row['key']}: {type(error).__name__} {error}")
        if problems:
            raise DataError(_told("some prompts cannot be scored", problems))

    def judge(self, prompt: Mapping[str, Any], response: str) -> Verdict:
        """Says which instructions of a prompt a response follows; the same each time."""
        with _seeded():
            found = self._process(prompt, [response])
        return Verdict(tuple(map(bool, found[INSTRUCTION_STRICT])), tuple(map(bool, found[INSTRUCTION_LOOSE])))


def score_verdicts(verdicts: Sequence[Verdict], protocol: Protocol) -> tuple[tuple[Score, ...], Items]:
    """Gives the four accuracies, and prompt by prompt what the first of them is made of.

    Instructions of one prompt stand or fall together, so standard errors treat prompts as independent, not them.
    """
    items = {}
    for level, name in (("strict", PROMPT_STRICT), ("loose", PROMPT_LOOSE)):
        items[name] = Items(np.array([all(getattr(v, level)) for v in verdicts], float), np.ones(len(verdicts), int))
    for level, name in (("strict", INSTRUCTION_STRICT), ("loose", INSTRUCTION_LOOSE)):
        followed = [getattr(verdict, level) for verdict in verdicts]
        items[name] = Items(np.array(list(map(sum, followed)), float), np.array(list(map(len, followed))))
    scores = []
    for name, entry in items.items():
        value, error = entry.ratio()
        scores.append(Score(name=name, value=value, standard_error=error, n=int(entry.counts.sum()), protocol=protocol))
    return tuple(scores), items[PROMPT_STRICT]


def _problem_of(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "it is no object"
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(row.get(name), kind)]
    if wrong:
        return f"{', '.join(wrong)} missing or of another type"
    ids, arguments = row["instruction_id_list"], row["kwargs"]
    if not ids or len(ids) != len(arguments) or not all(isinstance(entry, dict) for entry in arguments):
        return f"{len(ids)} instructions with {len(arguments)} objects of arguments: there must be one for each"
    return None


def _told(what: str, problems: Sequence[str]) -> str:
    lines = [f"{what}:", *(f"  {problem}" for problem in problems[:_NUM_TOLD])]
    return "\n".join(lines) + (f"\n  and {len(problems) - _NUM_TOLD:,} more" if len(problems) > _NUM_TOLD else "")


def _from_hub() -> list[Any]:
    from datasets import load_dataset

    try:
        return list(load_dataset("google/IFEval", split="train"))
    # Without a network, a cache or the data set, each layer raises something of its own.
    except Exception as error:
        raise DataError(
            "the prompts of IFEval are not on this machine and google/IFEval cannot be fetched "
            f"({' '.join(str(error).split())[:200]}): give the file with --ifeval_data input_data.jsonl (541 lines, "
            "google-research/instruction_following_eval/data on GitHub)"
        ) from error


def _check_splitter() -> None:
    """Checks the data of NLTK's sentence splitter, which LlamaIndex's package brings, too."""
    import nltk

    try:
        core = find_spec("llama_index.core")
    except ModuleNotFoundError:
        core = None
    if core is not None and core.origin is not None:
        folder = str(Path(core.origin).parent / "_static" / "nltk_cache")
        if folder not in nltk.data.path:
            nltk.data.path.append(folder)
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError as error:
        raise InputError(
            "ifeval counts sentences by NLTK's punkt_tab, which is not on this machine: fetch it with "
            "python -m nltk.downloader punkt_tab, or, where only a package index can be reached, with "
            "pip install --no-deps llama-index-core, or set NLTK_DATA to a folder with tokenizers/punkt_tab"
        ) from error


@contextmanager
def _seeded() -> Iterator[None]:
    """Fixes what an instruction without arguments draws, and leaves the random state as it was.

    Nor is a line printed for each response without a language.
    """
    log = logging.getLogger("lm_eval.tasks.ifeval")
    state, level = random.getstate(), log.level
    random.seed(0)
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        random.setstate(state)
        log.setLevel(level)
