"""JSON out of other people's files: parsed without losing anything, and what is wrong with it in words."""

import json
from collections import Counter
from typing import Any

# What `parse_json` raises.
JSON_ERRORS = (ValueError, RecursionError)


def parse_json(text: str) -> Any:
    """Parses a JSON text; raises one of `JSON_ERRORS`, for an object that has a key twice, too."""
    return json.loads(text, object_pairs_hook=_object)


def explain_json(error: ValueError | RecursionError) -> str:
    """Says what is wrong with a text that `parse_json` refused."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at character {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply"
    return str(error) if isinstance(error, _KeyGivenTwice) else "JSON with a number of too many digits"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # Python would keep the last one and lose the others.
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise _KeyGivenTwice(f"JSON with an object that has {twice[:60]!r} twice, of which one would be lost")
    return found


class _KeyGivenTwice(ValueError):
    pass
