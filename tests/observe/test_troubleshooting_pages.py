"""The pages of symptoms say what the console says."""

import ast
from pathlib import Path

import pytest

import onecard
from onecard.observe.detectors import entries, make_finding, sections
from onecard.observe.troubleshooting import PAGES, render, write_pages

DOCS = Path(__file__).parents[2] / "docs"
SOURCES = Path(onecard.__file__).parent


@pytest.mark.parametrize("language", PAGES)
def test_pages_are_those_of_the_catalogue(language) -> None:
    # To write them anew: python -m onecard.observe.troubleshooting
    assert (DOCS / PAGES[language]).read_text(encoding="utf-8") == render(language)


def test_pages_are_written_as_they_are_rendered(tmp_path) -> None:
    write_pages(tmp_path)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {
        name: render(language) for language, name in PAGES.items()
    }


def test_each_finding_has_its_words_and_its_chapter() -> None:
    for entry in entries().values():
        assert entry.section in sections(), entry.id
        assert entry.id == entry.id.lower()
        assert set(entry.id) <= set("abcdefghijklmnopqrstuvwxyz-"), entry.id
        for text in entry.texts.values():
            words = (text.symptom, text.cause, text.remedy)
            assert all(words), entry.id
            assert bool(text.effect) == entry.has_detector, entry.id
            assert not any(word.endswith((".", "。")) for word in words), entry.id
        english = entry.texts["en"]
        # Any console can print them.
        assert (english.symptom + english.cause + english.remedy + english.effect).isascii(), entry.id
    assert {entry.section for entry in entries().values()} == set(sections())


def test_detectors_make_exactly_the_findings_that_the_catalogue_says_they_make() -> None:
    made = set()
    for path in (SOURCES / "observe" / "detectors").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "make_finding":
                made.add(ast.literal_eval(node.args[0]))
    assert made == {entry.id for entry in entries().values() if entry.has_detector}


def test_all_that_a_run_finds_has_an_entry() -> None:
    made = {
        path.name
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("FindingEvent", "Finding")
    }
    assert made == {"catalogue.py"}


def test_names_keep_their_spelling_at_the_beginning_of_a_sentence() -> None:
    for language in PAGES:
        page = render(language)
        assert all(f"**{name}" in page for name in ("torch.compile", "fp16"))
    assert "**nvidia-smi" in render("zh")
    assert "**The loss runs away.**" in render("en")


def test_a_finding_has_the_words_of_its_entry() -> None:
    finding = make_finding("starved-by-data", "as seen", "dataloader_num_workers: 4", effect="twice as fast")
    text = entries()["starved-by-data"].texts["en"]
    assert (finding.symptom, finding.likely_cause, finding.evidence) == (text.symptom, text.cause, "as seen")
    assert finding.remedy == f"{text.remedy}: dataloader_num_workers: 4 (twice as fast)"
    told = make_finding("starved-by-data", "as seen", "dataloader_num_workers: 4").remedy
    assert told == f"{text.remedy}: dataloader_num_workers: 4 ({text.effect})"
    assert make_finding("compile-failed", "no Triton", "").remedy == entries()["compile-failed"].texts["en"].remedy
    with pytest.raises(KeyError):
        make_finding("not-there", "", "")
