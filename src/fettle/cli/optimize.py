"""`fettle optimize`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fettle.cli.output import AsJson, console, print_json, progress_bar
from fettle.core.home import Home
from fettle.core.plugins import missing_extra
from fettle.core.project import Project

if TYPE_CHECKING:
    from fettle.pipeline import Outcome


def optimize(
    project: Annotated[Path, typer.Argument(help="fettle.toml, or its folder.")] = Path("fettle.toml"),
    threads: Annotated[int, typer.Option(min=1, help="Threads of every runtime.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Find the best form of the model under its budget, register it, write report.html.

    Exit code 1 where the accuracy floor is missed: the best found is registered all the same.
    """
    opened = Project.open(project)
    try:
        from fettle.pipeline import optimize_project
    except ModuleNotFoundError as problem:
        raise missing_extra("fettle optimize", problem) from None
    # A project that prints while it trains must not break the JSON.
    with redirect_stdout(sys.stderr), progress_bar() as progress:
        outcome = optimize_project(opened, home=Home.default(), progress=progress, threads=threads)
    print_outcome(outcome, as_json=as_json)
    if not outcome.met_floor:
        typer.echo(f"fettle: {outcome.comparison.sentences[0]}", err=True)
        raise typer.Exit(1)


def print_outcome(outcome: Outcome, *, as_json: bool) -> None:
    """The table, then in sentences: the verdict, where int8 loses accuracy, what was tried against that, the rest."""
    if as_json:
        print_json(outcome.to_json())
        return
    from fettle.evaluate.layers import notable
    from fettle.evaluate.table import render_table

    out, found = console(), outcome.comparison
    out.print(render_table(found, width=out.width))
    for sentence in (
        *found.sentences,
        *(line.sentence() for line in notable(found.layers)),
        *(f"correction {decision}" for decision in found.decisions),
        *(f"note: {sentence}" for sentence in found.left_float),
        f"registered as {found.name}:{outcome.best.version}",
    ):
        out.print(sentence, markup=False)
    out.print(f"report: {outcome.report}", markup=False, soft_wrap=True)
