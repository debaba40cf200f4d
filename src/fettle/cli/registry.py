"""`fettle registry ...` and `fettle compare`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fettle.cli.output import AsJson, console, print_json
from fettle.core import codec
from fettle.core.errors import RegistryError, UsageError
from fettle.core.home import Home
from fettle.core.names import Reference
from fettle.core.report import Report
from fettle.core.version import Change, Version
from fettle.evaluate.comparison import compare_reports
from fettle.evaluate.table import render_rows
from fettle.registry import Registry

app = typer.Typer(help="Versions, aliases and their history.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The model's name.")]
Ref = Annotated[str, typer.Argument(help="NAME, NAME@alias or NAME:version.")]
Alias = Annotated[str, typer.Option(help="The alias to move.")]
Reason = Annotated[str, typer.Option(help="Why, for the history.")]


@app.command("list")
def list_versions(
    name: Annotated[str | None, typer.Argument(help="One model only.")] = None, as_json: AsJson = False
) -> None:
    """All models, or the versions of one."""
    registry = Registry(Home.default())
    if name is not None:
        registry.get(Reference(name))  # a name that was never registered is an error, not an empty table
    versions = [version for each in ([name] if name else registry.names()) for version in registry.versions(each)]
    if as_json:
        print_json([_plain(version) for version in versions])
        return
    table = Table("version", "aliases", "runtime", "precision", "metric", "size", "digest", "created", box=None)
    for version in versions:
        metric = f"{version.reports[0].metric.value:.4f}" if version.reports else ""
        aliases, size = ", ".join(version.aliases), f"{version.size_bytes / 1000:.0f} kB"
        table.add_row(
            str(version),
            aliases,
            version.runtime,
            version.precision,
            metric,
            size,
            version.digest[:12],
            version.created,
        )
    console().print(table)


@app.command()
def show(reference: Ref, as_json: AsJson = False) -> None:
    """One version with its reports."""
    version = Registry(Home.default()).get(reference)
    if as_json:
        print_json(_plain(version))
        return
    out = console()
    for key, value in _plain(version).items():
        if key != "reports":
            out.print(f"{key:12} {value}", markup=False)
    for report in version.reports[:1]:
        for measurement in report.measurements:
            out.print(f"{measurement.name:24} {measurement.value:.6g} {measurement.unit}", markup=False)


@app.command()
def promote(reference: Ref, alias: Alias = "champion", reason: Reason = "", as_json: AsJson = False) -> None:
    """Let the alias mean this version: one transaction, written into the history."""
    registry = Registry(Home.default())
    if Reference.parse(reference).version is None:
        raise UsageError(
            f"promote needs a version number, such as {Reference.parse(reference).name}:2, got {reference!r}"
        )
    version = registry.get(reference)
    _print_change(registry.promote(version.name, version.version, alias=alias, reason=reason), as_json=as_json)


@app.command()
def rollback(name: Name, alias: Alias = "champion", reason: Reason = "", as_json: AsJson = False) -> None:
    """Let the alias mean what it meant before: one transaction, written into the history."""
    _print_change(Registry(Home.default()).rollback(name, alias=alias, reason=reason), as_json=as_json)


@app.command()
def history(
    name: Annotated[str | None, typer.Argument(help="One model only.")] = None, as_json: AsJson = False
) -> None:
    """Who changed what, when and why."""
    registry = Registry(Home.default())
    if name is not None:
        registry.get(Reference(name))
    changes = registry.history(name)
    if as_json:
        print_json([codec.to_json(change) for change in changes])
        return
    table = Table("number", "time", "action", "model", "alias", "from", "to", "who", "why", box=None)
    for change in changes:
        before = "" if change.before is None else str(change.before)
        table.add_row(
            str(change.number), change.time, change.action, change.name, change.alias or "", before,
            str(change.after), change.actor, change.reason,
        )  # fmt: skip
    console().print(table)


@app.command()
def verify(
    anchor: Annotated[str | None, typer.Option(help="A history hash noted elsewhere, to be found again.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read everything and check every hash and the history's chain. Exit code 1 where something is wrong."""
    problems = Registry(Home.default()).verify(anchor=anchor)
    if as_json:
        print_json({"problems": problems})
    else:
        console().print("\n".join(problems) or "everything is as it was written", markup=False)
    if problems:
        raise typer.Exit(1)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove, not only list.")] = False, as_json: AsJson = False
) -> None:
    """List, or remove, files that no version needs; what changed in the last day is spared."""
    paths = Registry(Home.default()).gc(dry_run=not delete)
    if as_json:
        print_json({"deleted": delete, "paths": paths})
        return
    for path in paths:
        typer.echo(path)


def compare(
    a: Ref,
    b: Annotated[str, typer.Argument(help="Another version, or 'original': what the version was made from.")],
    html: Annotated[Path | None, typer.Option(help="Write a page as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Two versions, or a version and the original, measurement by measurement."""
    registry = Registry(Home.default())
    first = registry.get(a)
    left = _report(first)
    right = _original(first) if b == "original" else _report(registry.get(b))
    if b == "original":  # the original is the older one: differences read from it to the version
        left, right, a, b = right, left, b, a
    rows = compare_reports(left, right)
    if html is not None:
        from fettle.evaluate.html import write_rows_html

        write_rows_html(left, right, html, names=(a, b))
    if as_json:
        print_json({"a": a, "b": b, "rows": [row.to_json() for row in rows]})
    else:
        console().print(render_rows(rows, a=a, b=b))


def _report(version: Version) -> Report:
    if not version.reports:
        raise RegistryError(f"{version} holds no report, so there is nothing to compare: optimize it with this fettle")
    return version.reports[0]


def _original(version: Version) -> Report:
    for report in version.reports:
        if report.subject != version.digest and report.kind == "evaluation":
            return report
    raise RegistryError(f"{version} holds no report of an original: it is the untouched model, or was put by hand")


def _plain(version: Version) -> dict[str, Any]:
    plain: dict[str, Any] = codec.to_json(version)
    return plain


def _print_change(change: Change, *, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(change))
        return
    before = "nothing" if change.before is None else f"{change.name}:{change.before}"
    console().print(f"{change.name}@{change.alias}: {before} -> {change.name}:{change.after}", markup=False)
