"""What code of transformers stumbled over, in words for people."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecard.errors import CheckpointError, DoesNotFitError
from onecard.model.shortage import is_out_of_memory

_REMEDIES = {
    "model": "Copy or download its config.json and weights again",
    "tokenizer": "Copy or download its tokenizer.json and tokenizer_config.json again",
    "adapter": "Copy or download its adapter_config.json and adapter_model.safetensors again",
}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Names of classes of errors, which say nothing to people.
_CLASS = re.compile(r"\b[A-Z]\w*(?:Error|Exception): ")
_KIND = re.compile(r"<class '(\w+)'>")
_MOST_LETTERS = 300


def explain_error(error: Exception) -> str:
    """Gives an error's text on one line, and says what kind of mistake it is where the text is a word alone."""
    text = _KIND.sub(r"\1", _CLASS.sub("", _COLOUR.sub("", str(error)))).replace("NoneType", "null")
    text = " ".join(text.split())[:_MOST_LETTERS].rstrip(".")
    if isinstance(error, KeyError):
        return f"{text} is missing, or unknown"
    if isinstance(error, TypeError | AttributeError | IndexError):
        return f"a value in it is of another kind than is expected ({text})"
    return text or type(error).__name__


@contextmanager
def explained(folder: Path | str, what: str) -> Iterator[None]:
    """Turns whatever happens while a model, a tokenizer or an adapter is read into an error that says what to do.

    Raises:
        CheckpointError: the folder holds none that can be read.
        DoesNotFitError: memory ran out, which says nothing of the files.
    """
    try:
        yield
    # A damaged file makes transformers raise whatever its reading code stumbles over.
    except Exception as error:
        if is_out_of_memory(error):  # nobody is to set the files aside for it
            raise DoesNotFitError(
                f"memory ran out while {folder} was loaded ({error}): close what else uses it, and try again"
            ) from error
        raise CheckpointError(
            f"{folder} holds no {what} that transformers can read: {explain_error(error)}. {_REMEDIES[what]}"
        ) from error
