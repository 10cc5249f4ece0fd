"""The layout of the design, checked against every import, lazy ones included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import onecard

ROOT = Path(onecard.__file__).parent

LEVELS = (
    {"errors", "units"},
    {"spec"},
    {"hardware", "observe", "report"},
    {"data", "model", "distributed"},
    {"checkpoint"},
    {"training", "evaluation"},
    {"planner"},
    {"run", "handover", "diagnose"},
    {"trials"},
    {"api"},
    {"cli"},
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}
TORCH_FREE = {"errors", "units", "spec", "hardware", "observe", "report"}
HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes"}
ALLOWED_SIDEWAYS = {("report", "observe")}

# Exceptions to the size rules; the lists may only shrink.
LONG_MODULES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 50, 6
MANY_PARAMETERS = {
    "api/using.py:generate",  # the knobs of sampling, by name
    "cli/chat.py:chat",  # one per flag
    "cli/evaluate.py:evaluate",  # one per flag
    "cli/generate.py:generate",  # one per flag
    "cli/serve.py:serve",  # one per flag
    "model/attention.py:attend_sdpa",  # transformers' attention interface
    "model/attention.py:attend_varlen",
}
UNWANTED_NAMES = ("utils", "common", "misc", "helper", "manager", "base_")


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_down_only() -> None:
    wrong = []
    for path, tree in modules():
        package = package_of(path)
        if package in ("__init__", "__main__"):
            continue
        for name in imported_names(tree):
            parts = name.split(".")
            if parts[0] != "onecard" or parts[1] == package or parts[1] not in LEVEL_OF:
                continue
            is_down = LEVEL_OF[parts[1]] < LEVEL_OF[package] or (package, parts[1]) in ALLOWED_SIDEWAYS
            if not is_down:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_every_package_has_its_level() -> None:
    found = {package_of(path) for path, _ in modules()} - {"__init__", "__main__"}
    assert found <= set(LEVEL_OF), found - set(LEVEL_OF)


def test_torch_free_layers_import_nothing_heavy() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in modules()
        if package_of(path) in TORCH_FREE
        for name in imported_names(tree)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, wrong


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_sizes_stay_readable() -> None:
    long_modules, long_functions, many_parameters = set(), set(), set()
    for path, tree in modules():
        name = path.relative_to(ROOT).as_posix()
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_MODULE_LINES:
            long_modules.add(name)
        for function in functions(tree):
            place = f"{name}:{function.name}"
            if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES:
                long_functions.add(place)
            if (
                len(
                    [a for a in (*function.args.args, *function.args.kwonlyargs) if a.arg not in ("self", "cls", "ctx")]
                )
                > MAX_PARAMETERS
            ):
                many_parameters.add(place)
    assert long_modules == LONG_MODULES
    assert long_functions == LONG_FUNCTIONS
    assert many_parameters == MANY_PARAMETERS


def test_names_say_what_things_are() -> None:
    wrong = [str(path.relative_to(ROOT)) for path, _ in modules() if any(word in path.stem for word in UNWANTED_NAMES)]
    assert not wrong, wrong


@pytest.mark.parametrize("word", ["strict=False", "filterwarnings", "import pickle", "trust_remote_code=True"])
def test_nothing_is_silenced_or_trusted(word: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path, _ in modules()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if word in line
    ]
    assert not wrong, wrong
