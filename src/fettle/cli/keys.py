"""`fettle keys ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from fettle.cli.output import AsJson, console, print_json
from fettle.core.errors import UsageError
from fettle.core.home import Home
from fettle.serve.key_file import add_key, read_keys, remove_key
from fettle.serve.keys import ACTIONS, Action, Key, new_key

app = typer.Typer(help="API keys for `fettle serve`: who may infer, read and administer.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="What the key is called, in the list and in the access log.")]
File = Annotated[Path | None, typer.Option(help="Key file, by default keys.json in FETTLE_HOME.")]


@app.command()
def add(
    name: Name,
    models: Annotated[list[str] | None, typer.Option(help="Models it is good for, by default all. Repeatable.")] = None,
    actions: Annotated[list[str] | None, typer.Option(help="infer, read or admin; by default infer.")] = None,
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once: the file holds only its SHA-256."""
    path = _path(file)
    allowed: Literal["*"] | list[str] = "*" if not models or models == ["*"] else models
    key, text = new_key(name, models=allowed, actions=[_action(action) for action in actions or ["infer"]])
    add_key(path, key)
    if as_json:
        print_json({**_plain(key), "key": text})
        return
    typer.echo(text)
    typer.echo(f"'{name}' is in {path}. The key above is not kept anywhere: store it now.", err=True)


@app.command("list")
def list_keys(file: File = None, as_json: AsJson = False) -> None:
    """The keys' names and what they are good for; never the keys."""
    path = _path(file)
    entries = read_keys(path).entries if path.exists() else ()
    if as_json:
        print_json([_plain(entry) for entry in entries])
        return
    table = Table("name", "models", "actions", "sha256", box=None)
    for entry in entries:
        models = "*" if entry.models == "*" else ", ".join(entry.models)
        table.add_row(entry.name, models, ", ".join(entry.actions), entry.sha256[:12])
    console().print(table)


@app.command()
def remove(name: Name, file: File = None) -> None:
    """Take a key back: servers that follow the file refuse it within a second."""
    path = _path(file)
    remove_key(path, name)
    typer.echo(f"'{name}' is no longer in {path}", err=True)


def _path(file: Path | None) -> Path:
    return file if file is not None else Home.default().keys


def _action(text: str) -> Action:
    for action in ACTIONS:
        if action == text:
            return action
    raise UsageError(f"an action must be one of {', '.join(ACTIONS)}, got {text!r}")


def _plain(key: Key) -> dict[str, Any]:
    models = key.models if key.models == "*" else list(key.models)
    return {"name": key.name, "models": models, "actions": list(key.actions), "sha256": key.sha256}
