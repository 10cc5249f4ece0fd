"""Commands to type next, as they work in the shell that is open."""

import shutil
import sys
from pathlib import Path


def command(program: str) -> str:
    """Names a program of this environment: bare where the shell finds it, otherwise by its path.

    After `make demo` or `demo.bat` the environment is not activated, so that a bare `onecard` would not be found.
    """
    if shutil.which(program):
        return program
    path = Path(sys.executable).parent / program
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return quote(path)


def quote(path: Path) -> str:
    """Puts quotes that every shell understands around a path with spaces."""
    return f'"{path}"' if " " in str(path) else str(path)
