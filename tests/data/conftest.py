"""Small corpora made on the spot; nothing here needs a network or files outside the test's own folder."""

import random
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine must not fail a property test by its clock.
settings.register_profile("onecard", deadline=None)
settings.load_profile("onecard")

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew potent jade elixir 红楼梦 第一回 甄士隐"


def make_text(num_words: int, seed: int) -> str:
    random_words = random.Random(seed).choices(TEXT.split(), k=num_words)
    return "".join(word + ("\n" if index % 9 == 8 else " ") for index, word in enumerate(random_words))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def many_files(tmp_path: Path) -> Path:
    """A folder of 60 different text files."""
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(60):
        (folder / f"{index:02d}.txt").write_text(make_text(60, index), encoding="utf-8", newline="\n")
    return folder


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    path.write_text(make_text(4000, 1), encoding="utf-8", newline="\n")
    return path
