"""A trained model to talk to, here or over HTTP."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.api.here import probe_here
from onecard.errors import InputError

if TYPE_CHECKING:
    import socket

    from onecard.handover.chat import Chat


def open_chat(
    model: str | Path, *, system: str | None = None, checkpoint: str = "best", device: str = "auto", **sampling: Any
) -> "Chat":
    """Opens a conversation with a run's checkpoint, or any folder of a model or adapter.

    `chat.ask("Hello").text` is its answer. `sampling` are `max_new_tokens`, `temperature`, `top_k`, `top_p` and `seed`.

    Raises:
        InputError: no such model, one without a chat template, or sampling values without a meaning.
    """
    from onecard.handover.chat import Chat
    from onecard.handover.writer import Writer
    from onecard.model.generate import Sampling
    from onecard.planner import choose_device
    from onecard.run.answers import load_for_use
    from onecard.run.find import find_folder, find_model_folder, has_chat_template

    settings = Sampling(**sampling)
    settings.check()
    if not has_chat_template(find_model_folder(find_folder(model), checkpoint)):
        raise InputError(
            f"{model} has no chat template: it was trained to go on with text, not to answer. Let it write with "
            f'`onecard generate {model} --prompt "..."`, or train it on chats (docs/fine-tuning.md)'
        )
    chosen, _ = choose_device(device, probe_here())
    return Chat(Writer(*load_for_use(find_folder(model), checkpoint, chosen)), settings, system)


def serve(
    model: str | Path,
    *,
    port: int = 8000,
    checkpoint: str = "best",
    device: str = "auto",
    on_ready: Callable[[str, str, bool], None] | None = None,
    **settings: Any,
) -> None:
    """Serves a model over HTTP in the form of OpenAI's API, to this machine alone, until Ctrl+C.

    `settings` are `host`, `name` (for clients; else the folder's), `api_key`, `allow_origins` (web pages that may ask,
    none by default), and `max_new_tokens`, `temperature`, `top_k`, `top_p` of requests that do not say. `on_ready` gets
    the URL, the name, and whether the model can chat. Port 0 takes a free one. Needs the extra `serve`.

    Raises:
        InputError: no such model, a port in use, or sampling values without a meaning.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'onecard[serve]'") from error
    from onecard.handover.server import ServerSettings, Service, make_app, run_server
    from onecard.handover.worker import Worker
    from onecard.handover.writer import Writer
    from onecard.model.generate import Sampling
    from onecard.planner import choose_device
    from onecard.run.answers import load_for_use
    from onecard.run.find import find_folder

    host, name = settings.pop("host", "127.0.0.1"), settings.pop("name", None)
    api_key, allow_origins = settings.pop("api_key", None), tuple(settings.pop("allow_origins", ()))
    _check_access(host, api_key, allow_origins)
    if name is not None and not name.strip():
        raise InputError("name is empty, and clients ask for a model by its name: give one, or leave it out")
    sampling = Sampling(**settings)
    sampling.check()
    chosen, _ = choose_device(device, probe_here())
    # A name of a folder that is no UTF-8 could not be told to any client.
    name = (name or find_folder(model).resolve().name).encode("utf-8", "replace").decode("utf-8")
    with _listen(host, port) as listening:
        writer = Writer(*load_for_use(find_folder(model), checkpoint, chosen))
        served = ServerSettings(name, sampling, api_key, allow_origins, is_private=_is_loopback(listening))
        worker = Worker(writer)
        app = make_app(Service(writer, worker, served), served)
        if on_ready is not None:
            on_ready(_url(host, listening), name, writer.template is not None)
        run_server(app, listening, worker)


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)


def _check_access(host: str, api_key: str | None, allow_origins: Sequence[str]) -> None:
    """Refuses what would let in others than was meant, or nobody."""
    problems = []
    if not host:
        problems.append("host is empty, which would let in every machine: give 127.0.0.1, or 0.0.0.0 if that is meant")
    if api_key is not None and not api_key.strip():
        problems.append("api_key is empty, which protects nothing: give a key, or leave it out")
    problems += [
        f"allow_origin {origin!r} is no origin as browsers send it: give https://page.example or *"
        for origin in allow_origins
        if origin != "*" and not _ORIGIN.fullmatch(origin)
    ]
    if api_key and api_key.strip() and not re.fullmatch(r"[!-~]+", api_key):
        problems.append("api_key has characters that no client can send: give letters, digits and signs of ASCII")
    if problems:
        raise InputError("\n".join(problems))


def _is_loopback(listening: "socket.socket") -> bool:
    import ipaddress

    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _listen(host: str, port: int) -> "socket.socket":
    """Takes the port before anything slow is done, so that one in use is told at once."""
    import socket

    if not 0 <= port < 1 << 16:
        raise InputError(f"port is {port}: give a number from 0 (any free port) to 65535")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, ValueError, TypeError) as error:  # the last two: a name that no resolver can be asked for
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on {host}, port {port} ({reason}): end what uses it, or give another --port"
            " (0: any free one) or --host"
        ) from error


def _url(host: str, listening: "socket.socket") -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listening.getsockname()[1]}/v1"
