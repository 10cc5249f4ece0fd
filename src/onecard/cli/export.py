"""`onecard export`."""

from pathlib import Path
from typing import Annotated

import typer

from onecard.cli.recipe_words import JsonOption
from onecard.units import format_bytes

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run or model folder, a checkpoint, or latest.")]
ToOption = Annotated[
    str, typer.Option(help="hf, merged (an adapter in its base), adapter (PEFT) or gguf (llama.cpp, Ollama).")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="f32, bf16, fp16, or q8_0 in GGUF; else bf16, f32 for adapters, q8_0 for GGUF.")
]
OutputOption = Annotated[Path | None, typer.Option(help="The new folder; else one in exports/ of the run.")]


def export(
    run: RunArgument,
    to: ToOption,
    dtype: DtypeOption = None,
    checkpoint: Annotated[str, typer.Option(help="best, last or a step, of a run.")] = "best",
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Writes a model for other tools, reads it back and says how near it is to what was trained."""
    from onecard import api

    written = api.export(run, to, dtype=dtype, checkpoint=checkpoint, output=output)
    if as_json:
        print(written.model_dump_json())
        return
    fidelity = written.fidelity
    print(f"written     {written.folder}  {written.format}, {written.dtype}, {format_bytes(written.num_bytes)}")
    if written.checkpoint:
        print(f"of          {written.checkpoint}")
    print(
        f"read back   logits off by {fidelity.largest_difference:.3g} at most ({fidelity.share:.3%} of their range); "
        f"likeliest token the same at {fidelity.same_top_share:.1%} of {fidelity.num_tokens} places"
    )
    for note in written.notes:
        print(f"note        {note}")
