"""Renames that others may be in the way of."""

import sys
import time
from pathlib import Path

# A virus scanner or an indexer holds new files for some tenths of a second, rarely longer.
_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def move(source: Path, target: Path) -> None:
    """Renames a file or folder; where Windows refuses because somebody has it open, tries again for three seconds."""
    for pause_s in _PAUSES_S if sys.platform == "win32" else ():
        try:
            source.replace(target)
            return
        except PermissionError:  # a sharing violation, an open memory map and a lack of rights look the same
            time.sleep(pause_s)
    source.replace(target)
