"""Whether models can be downloaded, and a download that broke off goes on."""

import time
import urllib.error
import urllib.request

from onecard.diagnose.check import Check

_FILE = "gpt2/resolve/main/config.json"
_MIRROR = "https://hf-mirror.com"
_TIMEOUT_S = 8.0


def check_hub(endpoint: str, *, is_offline: bool, timeout_s: float = _TIMEOUT_S) -> Check:
    """Asks the Hub, or its mirror, for ten bytes in the middle of a small file."""
    name = "Hugging Face Hub"
    if is_offline:
        return Check(name, "not applicable", "HF_HUB_OFFLINE is set: only what is in the cache is used")
    url = f"{endpoint.rstrip('/')}/{_FILE}"
    try:
        request = urllib.request.Request(url, headers={"Range": "bytes=10-19", "User-Agent": "onecard"})
        started = time.perf_counter()
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            is_part = answer.status == 206
    except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors, a malformed address a ValueError
        return Check(name, "warning", f"{endpoint} cannot be reached: {_reason(error)}", _remedy(endpoint))
    answered = f"{endpoint} answers in {time.perf_counter() - started:.1f} s"
    if not is_part:
        remedy = f"HF_ENDPOINT={_MIRROR} resumes them" if _MIRROR not in endpoint else "unset HF_ENDPOINT"
        return Check(name, "warning", f"{answered}, but downloads that break off begin anew", remedy)
    return Check(name, "good", f"{answered}; downloads can be resumed")


def _remedy(endpoint: str) -> str:
    other = "unset HF_ENDPOINT" if _MIRROR in endpoint else f"set HF_ENDPOINT={_MIRROR}"
    return f"{other}, set HTTPS_PROXY, or use models and data that are in folders of yours: nothing else needs it"


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"status {error.code}"
    return str(getattr(error, "reason", None) or error)[:160]
