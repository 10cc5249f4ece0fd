"""Figures of findings in English, and in Chinese again."""

import re
import string
import tomllib
from pathlib import Path

import pytest

from onecard.observe.detectors import Phrasebook, entries, in_chinese, make_finding, phrases

ROWS = tomllib.loads(Path(phrases.__file__).with_name("phrases.toml").read_text(encoding="utf-8"))
_OURS = Path(phrases.__file__).parent
SOURCES = [
    path.read_text(encoding="utf-8") for folder in (_OURS, _OURS.parents[1] / "run") for path in folder.glob("*.py")
]


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("name", ROWS)
def test_a_phrase_is_found_again_in_chinese(name: str) -> None:
    english, chinese = ROWS[name]["en"], ROWS[name]["zh"]
    assert english.isascii()
    assert fields(english) == fields(chinese)
    values = {field: f"{number}.5" for number, field in enumerate(sorted(fields(english)), 1)}
    assert phrases.phrasebook().translate(phrases.phrase(name, **values)) == chinese.format(**values)
    assert any(f'"{name}"' in text or f"'{name}'" in text for text in SOURCES), "nobody says it"


def test_phrases_side_by_side_are_translated_each_and_settings_keep_their_commas() -> None:
    book = Phrasebook({"{n} steps": "{n} 步", "{n} of {m} steps": "{m} 步中的 {n} 步", "and so on": "等等"})
    assert book.translate("3 of 4 steps; lr: 1, wd: 2") == "4 步中的 3 步；lr: 1, wd: 2"
    assert book.translate("3 steps; 4 steps") == "3 步；4 步"
    assert book.translate("3 steps, 4 steps") == "3 步，4 步"
    assert book.translate("lr: 1, and so on") == "lr: 1，等等"
    assert book.translate("said by others") == "said by others"


def test_a_remedy_is_translated_with_its_setting_and_effect() -> None:
    evidence = phrases.phrase("waiting", share="40%", num=50, waited="0.2", each="0.5")
    effect = phrases.phrase("without-waiting", seconds="0.3")
    finding = make_finding("starved-by-data", evidence, "dataloader_num_workers: 2 instead of 0", effect)
    told, remedy = in_chinese(finding.id, finding.evidence, finding.remedy)
    assert told == "最近 50 步有 40% 的时间在等待：每步 0.5 秒中的 0.2 秒"
    words = entries()["starved-by-data"].texts["zh"]
    assert remedy == f"{words.remedy}：dataloader_num_workers: 2（原为 0）（不等待时每步 0.3 秒）"
    bare = make_finding("on-battery", phrases.phrase("discharging"), "")
    _, remedy = in_chinese(bare.id, bare.evidence, bare.remedy)
    assert remedy == f"{entries()['on-battery'].texts['zh'].remedy}（{entries()['on-battery'].texts['zh'].effect}）"
    assert not re.search("[a-z]{3} [a-z]{3}", told)


def test_what_a_record_of_another_version_says_stays() -> None:
    assert in_chinese("on-battery", "as it was", "plug it somewhere") == ("as it was", "plug it somewhere")


# As other parts of a run than detectors say it.
TOLD = {
    "non-finite": f"{phrases.phrase('refused-in-a-row', num=5)}, {phrases.phrase('last-refused', step=9)}, "
    f"{phrases.phrase('loss', loss='nan')}, {phrases.phrase('gradient-norm', norm='inf')}; "
    f"{phrases.phrase('gone-back', num=2)}",
    "left-out": phrases.phrase("no-evaluation", error="CUDA out of memory. Tried to allocate 1.50 GiB"),
    "score-not-written": phrases.phrase("score-of", name="best-of", task="ifeval", error="[Errno 28] No space left"),
    "finalist-damaged": phrases.phrase("led-by", name="step-000002", task="ifeval", error="damaged; use another"),
    "drive-wear": phrases.phrase("an-hour", size="931.3 GiB"),
}


@pytest.mark.parametrize("id", TOLD)
def test_what_a_run_says_beside_its_detectors_is_translated(id: str) -> None:
    evidence, _ = in_chinese(id, TOLD[id], entries()[id].texts["en"].remedy)
    words = re.sub("CUDA out of memory.*|damaged; .*|No space left", "", evidence)  # said by others
    assert re.search("[\u4e00-\u9fff]", words)
    assert not re.search("[a-z]{2,} [a-z]{2,}", words)
