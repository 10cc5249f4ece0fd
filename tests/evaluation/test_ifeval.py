"""Instructions that a program can check."""

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import DataError, InputError
from onecard.evaluation.ifeval import Checker, Verdict, match_responses, read_prompts, score_verdicts


def prompt(key: int, text: str, *instructions: str, **arguments: Any) -> dict[str, Any]:
    """A prompt; the arguments belong to its first instruction."""
    return {
        "key": key,
        "prompt": text,
        "instruction_id_list": list(instructions),
        "kwargs": [arguments, *({} for _ in instructions[1:])],
    }


PROMPTS = [
    prompt(1, "A fruit, no commas, lower case.", "punctuation:no_comma", "change_case:english_lowercase"),
    prompt(2, "Write two sentences.", "length_constraints:number_sentences", relation="at least", num_sentences=2),
    prompt(3, "Antworte auf Deutsch.", "language:response_language", language="de"),
    prompt(4, "End with: that is all", "startend:end_checker", end_phrase="that is all"),
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checker() -> Checker:
    if any(find_spec(name) is None for name in ("lm_eval", "langdetect", "immutabledict", "nltk")):
        pytest.skip("needs the extra eval")
    try:
        return Checker()
    except InputError:
        pytest.skip("needs NLTK's punkt_tab")


def test_responses_are_judged_as_the_instructions_say(checker: Checker) -> None:
    expected = [
        (PROMPTS[0], "an apple is what comes to my mind", (True, True), (True, True)),
        (PROMPTS[0], "an apple, or a pear, whichever you like", (False, True), (False, True)),
        (PROMPTS[1], "It is late. I go home.", (True,), (True,)),
        (PROMPTS[1], "It is late", (False,), (False,)),
        (PROMPTS[2], "Das ist ein ganz gewöhnlicher Satz in deutscher Sprache.", (True,), (True,)),
        (PROMPTS[2], "This is a plain sentence in the English language.", (False,), (False,)),
        # Loosely, a last line that is not part of the answer is forgiven.
        (PROMPTS[3], "Good night\nthat is all\nYours", (False,), (True,)),
        (PROMPTS[3], "", (False,), (False,)),
    ]
    for row, response, strict, loose in expected:
        assert checker.judge(row, response) == Verdict(strict, loose), response


def test_verdicts_do_not_depend_on_chance(checker: Checker) -> None:
    # Without arguments the harness draws them, and short texts are of many languages.
    drawn = prompt(9, "Say it.", "language:response_language", "length_constraints:number_words", language="es")
    found = set()
    for seed in range(20):
        random.seed(seed)
        found.add(checker.judge(drawn, "son la mar"))
        assert random.random() == random.Random(seed).random()
    assert len(found) == 1


def test_what_cannot_be_scored_is_known_before(checker: Checker) -> None:
    checker.try_out(PROMPTS)
    wrong = [prompt(7, "a", "length:no_such_thing"), prompt(8, "b", "punctuation:no_comma", words=3)]
    with pytest.raises(DataError, match=r"(?s)prompt 7: KeyError.*no_such_thing.*prompt 8: TypeError"):
        checker.try_out([*PROMPTS, *wrong])


def test_the_four_accuracies() -> None:
    verdicts = [Verdict((True, True), (True, True)), Verdict((False, True), (True, True)), Verdict((False,), (False,))]
    scores, items = score_verdicts(verdicts, {"task": "ifeval"})
    assert {score.name: (pytest.approx(score.value), score.n) for score in scores} == {
        "prompt_level_strict_acc": (1 / 3, 3),
        "prompt_level_loose_acc": (2 / 3, 3),
        "inst_level_strict_acc": (3 / 5, 5),
        "inst_level_loose_acc": (4 / 5, 5),
    }
    assert items.sums.tolist() == [1, 0, 0]
    assert scores[0].standard_error == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)


def test_prompt_files_are_checked_line_by_line(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", PROMPTS)
    assert read_prompts(good) == PROMPTS
    bad = write_lines(tmp_path / "bad.jsonl", [PROMPTS[0], 3, {**PROMPTS[1], "kwargs": []}, {"key": 1, "prompt": "a"}])
    with pytest.raises(DataError, match=r"(?s)line 2: it is no object.*line 3: 1 instructions with 0.*line 4: instr"):
        read_prompts(bad)
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "text.jsonl").write_text("no json\n", encoding="utf-8")
    for name, message in [("none.jsonl", "cannot be read"), ("empty.jsonl", "is empty"), ("text.jsonl", "no JSON")]:
        with pytest.raises(DataError, match=message):
            read_prompts(tmp_path / name)


def test_responses_find_their_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": PROMPTS[2]["prompt"], "response": "ja"}, {"prompt": PROMPTS[0]["prompt"], "response": ""}]
    file = write_lines(tmp_path / "responses.jsonl", rows)
    assert match_responses(file, PROMPTS) == [(PROMPTS[0], ""), (PROMPTS[2], "ja")]
    wrong = [*rows, rows[0], {"prompt": "who?", "response": "me"}, {"prompt": "a", "response": None}]
    with pytest.raises(DataError, match=r"(?s)line 3: a second response.*line 4: .*not one of.*line 5: it takes two"):
        match_responses(write_lines(tmp_path / "wrong.jsonl", wrong), PROMPTS)


def test_without_the_extra_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.evaluation.ifeval.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"lm_eval, langdetect.*onecard\[eval\]"):
        Checker()
