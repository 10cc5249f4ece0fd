"""What can be seen of a tokenizer's files without the library that reads them."""

import json
from collections.abc import Collection
from pathlib import Path

_FILES = ("tokenizer.json", "tokenizer_config.json")


def find_tokenizer_damage(folder: Path) -> str | None:
    """Says in plain words why no tokenizer can be read from a folder; None where its files look whole.

    For those that could not be read: some older tokenizers need no tokenizer.json.
    """
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            if name == _FILES[0]:
                return f"there is no {name} in it{_needs_more(folder)}"
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"its {name} is no JSON or breaks off ({error})"
        if not isinstance(content, dict) or (name == _FILES[0] and not isinstance(content.get("model"), dict)):
            return f"its {name} is JSON but no tokenizer's"
    return None


def find_missing_vocabulary(folder: Path, files: Collection[str]) -> str | None:
    """Says that none of the files is there from which a kind of tokenizer takes its vocabulary; None where one is.

    transformers then makes a tokenizer of the few tokens that its class has by itself, and says nothing. A kind that
    needs no files, as one of bytes, lacks none.
    """
    names = sorted({*files, _FILES[0]})
    # A vocabulary of sentencepiece or tiktoken is found by transformers under other names, too.
    if not files or any(any(folder.glob(name)) for name in (*names, "*.model", "*.tiktoken")):
        return None
    return f"its vocabulary is missing: there is none of {', '.join(names)} in it"


def _needs_more(folder: Path) -> str:
    older = sorted(path.name for path in folder.glob("*.model"))
    return f", and to read {older[0]} takes the package sentencepiece" if older else ""
