"""`onecard generate`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from onecard.cli.recipe_words import JsonOption
from onecard.cli.sampling_flags import (
    CheckpointOption,
    DeviceOption,
    RunArgument,
    SeedOption,
    TemperatureOption,
    TokensOption,
    TopKOption,
    TopPOption,
)
from onecard.errors import InputError


def generate(
    run: RunArgument,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to answer or to go on from; may be repeated.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="A file with one prompt per line.")] = None,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    checkpoint: CheckpointOption = "best",
    device: DeviceOption = "auto",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="Answer the prompt, or go on with it; by default as it was trained."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Lets a trained model write. Without a prompt, each line of standard input is one."""
    prompts = _prompts(prompt or [], prompt_file)
    from onecard import api

    if chat is None:
        chat = api.is_chat_model(run, checkpoint=checkpoint)
    completions = api.generate(
        run,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        checkpoint=checkpoint,
        device=device,
        chat=chat,
    )
    texts = list(zip(prompts, completions, strict=True))
    if as_json:
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
        print(json.dumps(rows, ensure_ascii=False))
    else:
        _print_texts(texts, joint="\n" if chat else "")


def _prompts(given: list[str], file: Path | None) -> list[str]:
    prompts = list(given)
    if file is not None:
        prompts += _lines(_read(file), str(file))
    elif not prompts and sys.stdin is not None and not sys.stdin.isatty():
        prompts += _lines(sys.stdin.buffer.read(), "standard input")
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise InputError('there is no prompt: give --prompt "text", --prompt-file FILE, or lines on standard input')
    return prompts


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error}): check the path") from error


def _lines(content: bytes, origin: str) -> list[str]:
    try:
        # utf-8-sig: Windows editors like to start a file with a byte order mark.
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{origin}: byte {error.start} is not UTF-8 text: save it as UTF-8") from error


def _print_texts(texts: list[tuple[str, str]], joint: str) -> None:
    """Prints prompt and completion with `joint` between them; a terminal shows the prompt dimmed."""
    from rich.console import Console
    from rich.text import Text

    from onecard.observe.console import printable

    console = Console(highlight=False)
    for number, (prompt, completion) in enumerate(texts):
        if number:
            print("---")
        if console.is_terminal:
            console.print(
                Text.assemble(
                    (printable(prompt + joint, console.encoding), "dim"), printable(completion, console.encoding)
                ),
                soft_wrap=True,
            )
        else:
            print(prompt + joint + completion)
