"""`fettle optimize`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from fettle.cli.output import AsJson, console, print_json, progress_bar
from fettle.core.home import Home
from fettle.core.plugins import missing_extra
from fettle.core.project import Project


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
        from fettle.evaluate.table import render_table
        from fettle.pipeline import optimize_project
    except ModuleNotFoundError as problem:
        raise missing_extra("fettle optimize", problem) from None
    # A project that prints while it trains must not break the JSON.
    with redirect_stdout(sys.stderr), progress_bar() as progress:
        outcome = optimize_project(opened, home=Home.default(), progress=progress, threads=threads)
    if as_json:
        print_json(outcome.to_json())
    else:
        out = console()
        out.print(render_table(outcome.comparison, width=out.width))
        for sentence in outcome.comparison.sentences:
            out.print(sentence)
        for failed in outcome.comparison.failed:
            out.print(f"failed: {failed.label}: {failed.failure}", markup=False)
        for sentence in outcome.comparison.left_float:
            out.print(f"left in float: {sentence}", markup=False)
        out.print(f"registered as {opened.name}:{outcome.best.version}", markup=False)
        out.print(f"report: {outcome.report}", markup=False, soft_wrap=True)
    if not outcome.met_floor:
        typer.echo(f"fettle: {outcome.comparison.sentences[0]}", err=True)
        raise typer.Exit(1)
