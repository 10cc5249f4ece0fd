"""`onecard bench`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from onecard.cli.recipe_words import ConfigOption, JsonOption, RecipeWords, source_from_words

SweepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY=VALUE,VALUE",
        help="Values of a recipe key to try, as in per_device_train_batch_size=16,24,32; several give their product.",
    ),
]
MinutesOption = Annotated[float, typer.Option("--minutes", help="Begin nothing after so many; preparation is apart.")]
PageOption = Annotated[
    Path | None, typer.Option("--page", help="Where to write the picture; by default bench-<recipe>-<time>.html.")
]


def bench(
    words: RecipeWords = None,
    config: ConfigOption = None,
    sweep: SweepOption = None,
    minutes: MinutesOption = 10.0,
    page: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Times a recipe on this machine, with each of the settings given: speed, memory, share of peak, beside the plan.

    Without RECIPE it times `demo`. Nothing is trained that stays; each setting runs in processes of its own.
    """
    from onecard import api
    from onecard.cli.bench_text import bench_document, bench_lines, speed_bars, table_rows
    from onecard.cli.rows import print_folded, print_rows
    from onecard.errors import EXIT_INTERRUPTED
    from onecard.report.bench_page import refuse_taken, write_page
    from onecard.trials.sweep import parse_sweeps

    source, overrides = source_from_words(words or [], config)
    if page is not None:
        refuse_taken(page)
    sweeps = parse_sweeps(sweep or [])
    try:
        found = api.bench(source, sweep=sweeps, minutes=minutes, on_progress=_tell, **overrides)
    except KeyboardInterrupt:  # before anything was timed
        print("stopped", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    lines = bench_lines(found)
    picture = write_page(found.source, table_rows(found), lines, speed_bars(found), page)
    if as_json:
        print(json.dumps(bench_document(found, picture), ensure_ascii=False, allow_nan=False))
    else:
        print_rows(table_rows(found))
        print()
        for line in lines:
            print_folded(line)
        print(f"picture      {picture}")
    if found.was_stopped:
        raise typer.Exit(EXIT_INTERRUPTED)
    if found.best is None:
        raise typer.Exit(1)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
