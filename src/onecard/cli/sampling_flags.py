"""The flags of every verb that lets a model write."""

from typing import Annotated

import typer

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run or model folder, a checkpoint, or latest.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", help="Tokens to write at most.")]
TemperatureOption = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Choose among the K likeliest tokens.")]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Choose among the likeliest tokens of mass P.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same text.")]
CheckpointOption = Annotated[str, typer.Option(help="best, last, or the step of a checkpoint.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
