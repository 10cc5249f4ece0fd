"""Numbers for people. The only module that divides by 1024."""

import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SIZE = re.compile(r"\+?(\d*\.?\d+(?:e[+-]?\d+)?)\s*(kib|mib|gib|tib|kb|mb|gb|tb|b)", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> float | None:
    """Reads a number with a unit as bytes: '3.2GB' -> 3.2e9, '3 GiB' -> 3 * 1024**3; None for any other text."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    number, unit = float(found[1]), found[2].lower()
    return number * (KIB if "i" in unit else 1000) ** _POWERS.get(unit[0], 0)


def format_bytes(num_bytes: float) -> str:
    """Writes a byte count with a binary unit: 1536 -> '1.5 KiB'."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(number: float) -> str:
    """Writes a count with a decimal suffix: 74_700_000 -> '74.7M'."""
    for suffix, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            scaled = number / size
            return f"{scaled:.2f}{suffix}" if scaled < 10 else f"{scaled:.1f}{suffix}"
    return f"{number:.0f}"


def format_seconds(seconds: float) -> str:
    """Writes a duration as a clock would: 3725 -> '1:02:05', 65 -> '1:05'."""
    total = max(0, round(seconds))
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{secs:02d}"
    return f"{minutes}:{secs:02d}"
