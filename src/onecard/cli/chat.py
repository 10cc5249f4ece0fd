"""`onecard chat`."""

from typing import Annotated

import typer

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


def chat(
    run: RunArgument,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    checkpoint: CheckpointOption = "best",
    device: DeviceOption = "auto",
) -> None:
    """Talks with a trained model. Inside, /help tells the commands; lines of standard input are turns, too."""
    from onecard import api
    from onecard.cli.conversation import Conversation

    opened = api.open_chat(
        run,
        system=system,
        checkpoint=checkpoint,
        device=device,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    Conversation(opened).run()
