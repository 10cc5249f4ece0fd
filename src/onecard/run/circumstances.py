"""Where and with what a checkpoint was written, and how that differs from here."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from onecard.spec import Plan

# Of these another version may compute other digits; the rest of an environment does not touch the numbers of a run.
_PACKAGES = ("onecard", "torch", "transformers", "peft", "bitsandbytes", "tokenizers")


def circumstances_of(plan: Plan) -> dict[str, Any]:
    """Versions, platform and card of this process."""
    is_cuda = plan.device.startswith("cuda") and torch.cuda.is_available()
    card = torch.cuda.get_device_name(torch.device(plan.device)) if is_cuda else "CPU"
    return {"versions": {name: _version(name) for name in _PACKAGES}, "platform": sys.platform, "card": card}


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[str]]:
    """Says what is different, by the name under which it is told: code, card."""
    changes: dict[str, list[str]] = {"code": [], "card": []}
    then, here = before.get("versions", {}), now["versions"]
    for name in _PACKAGES:
        if name in then and then[name] != here[name]:
            changes["code"].append(f"{name} {then[name]} then, {here[name]} now")
    for name in ("card", "platform"):
        if name in before and before[name] != now[name]:
            changes["card"].append(f"{name} {before[name]} then, {now[name]} now")
    return {name: found for name, found in changes.items() if found}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
