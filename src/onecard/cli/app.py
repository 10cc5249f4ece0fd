"""The typer application with its verbs, in the order in which people need them."""

from typing import Annotated

import typer

from onecard.cli.bench import bench
from onecard.cli.cards import cards
from onecard.cli.chat import chat
from onecard.cli.compare import compare
from onecard.cli.doctor import doctor
from onecard.cli.evaluate import evaluate
from onecard.cli.export import export
from onecard.cli.find_lr import find_lr
from onecard.cli.generate import generate
from onecard.cli.monitor import monitor
from onecard.cli.plan import plan
from onecard.cli.prepare import prepare
from onecard.cli.recipes import recipes
from onecard.cli.replay import replay
from onecard.cli.report import report
from onecard.cli.resume import resume
from onecard.cli.serve import serve
from onecard.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # `--top_k` is `--top-k`: people write both, as recipes do with underscores.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)

# Recipe keys are flags that typer does not know: these verbs sort them out themselves.
for _takes_recipe_keys in (train, plan, prepare, bench, find_lr):
    app.command(context_settings={"ignore_unknown_options": True})(_takes_recipe_keys)
for _takes_run in (
    *(resume, monitor, report, evaluate, compare, replay, generate, chat, serve, export),
    *(recipes, cards, doctor),
):
    app.command()(_takes_run)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"onecard {version('onecard')}")
        raise typer.Exit


@app.callback()
def onecard(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Plans, trains and fine-tunes small language models on the one GPU you have. Start with: onecard train demo"""
