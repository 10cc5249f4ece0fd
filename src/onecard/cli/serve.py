"""`onecard serve`."""

import json
import sys
from typing import Annotated

import typer

from onecard.cli.sampling_flags import (
    CheckpointOption,
    DeviceOption,
    RunArgument,
    TemperatureOption,
    TokensOption,
    TopKOption,
    TopPOption,
)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

HostOption = Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")]
PortOption = Annotated[int, typer.Option(help="0 takes a free one.")]
NameOption = Annotated[str | None, typer.Option(help="The model's name for clients; by default that of its folder.")]
KeyOption = Annotated[str | None, typer.Option("--api-key", envvar="ONECARD_API_KEY", help="Ask clients for this key.")]
OriginOption = Annotated[
    list[str] | None, typer.Option("--allow-origin", help="Web pages of this origin may ask, too; may be repeated.")
]


def serve(
    run: RunArgument,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    name: NameOption = None,
    api_key: KeyOption = None,
    allow_origin: OriginOption = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    checkpoint: CheckpointOption = "best",
    device: DeviceOption = "auto",
) -> None:
    """Serves a trained model over HTTP as OpenAI's clients expect it; the sampling flags are for requests without."""
    from onecard import api

    def tell(url: str, served: str, is_chat: bool) -> None:
        if host not in _LOOPBACK and api_key is None:
            print("anyone who reaches this machine can use the model: --api-key KEY asks for one", file=sys.stderr)
        _print_ready(url, served, is_chat, "KEY" if api_key else None)

    api.serve(
        run,
        port=port,
        checkpoint=checkpoint,
        device=device,
        on_ready=tell,
        host=host,
        name=name,
        api_key=api_key,
        allow_origins=allow_origin or (),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


def _print_ready(url: str, name: str, is_chat: bool, key: str | None) -> None:
    """Prints where the model is, and a first request in the words of a shell and of Python."""
    asks = {"messages": [{"role": "user", "content": "Hello"}]} if is_chat else {"prompt": "Hello"}
    path, call, got = (
        ("chat/completions", "chat.completions", "message.content")
        if is_chat
        else ("completions", "completions", "text")
    )
    # Double quotes alone: a Windows shell knows no others.
    body = json.dumps({"model": name} | asks).replace('"', '\\"')
    header = f' -H "Authorization: Bearer {key}"' if key else ""
    ((field, value),) = asks.items()
    print(f"{name} is served at {url} until Ctrl+C\n")
    print(f'curl {url}/{path} -H "Content-Type: application/json"{header} -d "{body}"\n')
    print(
        f'from openai import OpenAI; print(OpenAI(base_url="{url}", api_key="{key or "none"}").{call}.create('
        f'model="{name}", {field}={json.dumps(value)}).choices[0].{got})\n',
        flush=True,
    )
