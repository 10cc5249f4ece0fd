"""Why a row of a chat file cannot be used, in words for people."""

# Characters of a name or number in a message.
_LONGEST_SHOWN = 60


class BadTurn(Exception):
    """Why a row cannot be used; never leaves this package."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def check_text(value: object, place: str) -> str:
    """Gives the text back if it is one that can be learned or answered; raises BadTurn."""
    if value is None:
        raise BadTurn("null content", f"{place} is null")
    if not isinstance(value, str):
        raise BadTurn("not text", f"{place} is {describe(value)}, not text")
    if not value or value.isspace():
        raise BadTurn("empty turn", f"{place} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = f"U+{ord(value[error.start]):04X}"
        raise BadTurn("broken characters", f"{place} has half of a character ({shown}), which is no UTF-8") from error
    return value


def describe(value: object) -> str:
    """Names the kind of a JSON value for people."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"a number ({_shortened(str(value))})"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(quote, list(value)[:5])) or 'no keys'}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "text" if isinstance(value, str) else type(value).__name__


def quote(name: object) -> str:
    """Writes a name for people, however long it is."""
    return _shortened(repr(name))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
