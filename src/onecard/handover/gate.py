"""What is refused before anything reads it: bodies without end, and pages that pretend to be of this machine."""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The text of a context of 128 Ki tokens, each Chinese character escaped in six letters, is below it.
MOST_BODY_BYTES = 4 * 2**20
# What a client has begun to send is read to here, so that it hears why it is refused and not that the line broke.
_MOST_DISCARDED_BYTES = 16 * MOST_BODY_BYTES
# Pages from servers of this machine, such as one in development.
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
# Nobody can register a name that ends so (RFC 6761, RFC 6762, ICANN 2024).
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


class BodyLimit:
    """Middleware that refuses bodies beyond `MOST_BODY_BYTES` with status 413, and keeps no more of them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def receive_little() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            while num_bytes > MOST_BODY_BYTES:
                if num_bytes > _MOST_DISCARDED_BYTES or not message.get("more_body"):
                    raise HTTPException(
                        413, f"the body is larger than {MOST_BODY_BYTES:,} bytes, which no context has room for"
                    )
                message = await receive()
                num_bytes += len(message.get("body", b""))
            return message

        await self._app(scope, receive_little if scope["type"] == "http" else receive, send)


def is_of_this_machine(host: str, allow_origins: Collection[str]) -> bool:
    """Whether a header `Host` names no stranger: a page may let its own name lead to 127.0.0.1 (DNS rebinding).

    Addresses, names without a dot and those of local networks cannot be a page's; those of `allow_origins` may ask.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        allowed = {urlsplit(origin).hostname for origin in allow_origins}
    except ValueError:
        return False
    if "." not in name or name.endswith(_LOCAL_SUFFIXES) or name in allowed or "*" in allow_origins:
        return True
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
