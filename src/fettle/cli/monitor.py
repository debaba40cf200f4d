"""`fettle monitor ...`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.table import Table

from fettle.cli.output import AsJson, console, print_json
from fettle.core import codec
from fettle.core.errors import UsageError
from fettle.core.home import Home
from fettle.core.report import Report

app = typer.Typer(help="Compare what the model sees now with what it was measured on.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `report` a sub-command while it is the only one."""


@app.command()
def report(
    name: Annotated[str, typer.Argument(help="NAME, NAME@alias or NAME:version.")],
    window: Annotated[str | None, typer.Option(help='Only so far back, such as "1h" or "30m".')] = None,
    last: Annotated[int, typer.Option(min=1, help="At most so many predictions, the newest.")] = 2000,
    webhook: Annotated[str | None, typer.Option(help="Also tell this URL of an incident.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verdict: drift, no drift, or not enough data. Exit code 1 on drift; one alert per incident."""
    from fettle.monitor.alerts._base import AlertChannel
    from fettle.monitor.alerts.log import Log
    from fettle.monitor.alerts.webhook import Webhook
    from fettle.monitor.report import monitor_report
    from fettle.registry import Registry

    home = Home.default()
    registry = Registry(home)
    version = registry.get(name)
    channels: list[AlertChannel] = [Log()]
    if webhook is not None:
        channels.append(Webhook(url=webhook))
    since = None if window is None else datetime.now(UTC) - parse_window(window)
    found = monitor_report(
        name=version.name, artifact=registry.open(str(version)), home=home, since=since, last=last, channels=channels
    )
    if as_json:
        print_json({**codec.to_json(found), "verdict": found.judgement.verdict, "sentence": found.judgement.sentence})
    else:
        out = console()
        out.print(f"{version}: {found.judgement.verdict}\n{found.judgement.sentence}", markup=False)
        if found.summary.count:
            out.print(_table(found.report()))
        for problem in (*found.undelivered, *found.problems):
            out.print(problem, markup=False)
    if found.judgement.verdict == "drift":
        raise typer.Exit(1)


def _table(report: Report) -> Table:
    table = Table("measurement", "value", "unit", box=None)
    for measurement in report.measurements:
        table.add_row(measurement.name, f"{measurement.value:.4g}", measurement.unit)
    return table


def parse_window(text: str) -> timedelta:
    """A length of time.

    >>> parse_window("90m")
    datetime.timedelta(seconds=5400)
    """
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)
    if match is None:
        raise UsageError(f'a window must be like "90s", "30m", "1h" or "7d", got "{text}"')
    return timedelta(seconds=int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])
