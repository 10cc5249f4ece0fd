"""Plan, train, fine-tune, evaluate and hand over small language models on the one GPU you have."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onecard.api import (
        alternatives,
        bench,
        compare,
        evaluate,
        examine,
        export,
        find_lr,
        generate,
        load_recipe,
        monitor,
        open_chat,
        plan,
        prepare,
        replay,
        resume,
        serve,
        train,
        verify,
        write_report,
    )

__all__ = [
    "alternatives",
    "bench",
    "compare",
    "evaluate",
    "examine",
    "export",
    "find_lr",
    "generate",
    "load_recipe",
    "monitor",
    "open_chat",
    "plan",
    "prepare",
    "replay",
    "resume",
    "serve",
    "train",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `import onecard` and `onecard --help` cost nothing.
    if name in __all__:
        from onecard import api

        return getattr(api, name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("onecard")
        except PackageNotFoundError:  # run from the source tree
            return "0+source"
    raise AttributeError(f"module 'onecard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
