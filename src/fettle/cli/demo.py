"""`fettle demo`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import typer

from fettle.cli.output import AsJson, console, print_json, progress_bar
from fettle.core.home import Home
from fettle.core.plugins import missing_extra

if TYPE_CHECKING:
    from fettle.demo.run import Summary


def demo(as_json: AsJson = False) -> None:
    """The whole loop on embedded data: train, optimize, register, serve, watch, promote, roll back."""
    try:
        from fettle.demo.run import run_demo

        importlib.import_module("sklearn.datasets")  # told here, where the project's import would be a ProjectError
    except ModuleNotFoundError as problem:
        raise missing_extra("fettle demo", problem) from None
    with progress_bar() as progress:
        summary = run_demo(Home.default(), progress=progress)
    if as_json:
        print_json(summary.to_json())
    else:
        _print(summary)
    if not summary.ok:
        typer.echo("fettle: the demonstration did not go as promised; see the table", err=True)
        raise typer.Exit(1)


def _print(summary: Summary) -> None:
    out = console()
    for table in summary.tables(width=out.width):
        out.print(table)
    out.print(f"report: {summary.report}", markup=False, soft_wrap=True)
