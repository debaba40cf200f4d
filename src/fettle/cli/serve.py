"""`fettle serve`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fettle.core.errors import UsageError
from fettle.core.home import Home
from fettle.core.names import Reference

if TYPE_CHECKING:
    from fettle.serve.models import Catalogue
    from fettle.serve.options import ServeOptions
    from fettle.serve.source import ModelSource
    from fettle.serve.traffic import Traffic


# None is what the command line did not say: the file says it, or ServeOptions.
_Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help="NAME, NAME@alias (followed when it moves) or NAME:version, of each model. /predict is the first. May be "
        "left to the file.",
    ),
]
_Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="TOML file of options and models. What the command line says wins over it."),
]
_Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any option, by its name in the file, as workers=2 or tls_certificate=cert.pem; `false` for none. May be "
        "repeated.",
    ),
]
_Split = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REF=PERCENT",
        help="Share of a model's requests for another of its versions, as digits@challenger=10. The rest stays where "
        "it was. May be repeated.",
    ),
]
_Sticky = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="What keeps a client with one version of a split: header:NAME, cookie:NAME or payload.",
    ),
]
_Shadow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REF",
        help="Version that gets a copy of its model's requests; its answers are compared, logged and thrown away. May "
        "be repeated, once for each model.",
    ),
]
_Port = Annotated[int | None, typer.Option(min=0, max=65535, help="By default 8080; 0 for a free one.")]
_GrpcPort = Annotated[int | None, typer.Option(min=0, max=65535, help="Of gRPC; 0 for a free one.")]
_AdminPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Load and unload models here, with an admin key.")
]
_Keys = Annotated[
    Path | None, typer.Option(help="API keys to ask for (`fettle keys`), by default keys.json in FETTLE_HOME, if any.")
]
_LogFormat = Annotated[
    str | None,
    typer.Option(help="Of the lines on stderr: text, json, or by default auto: text on a terminal, else json."),
]
_AccessLog = Annotated[bool | None, typer.Option("--access-log", help="One line on stderr for each request.")]


def serve(
    models: _Models = None,
    config: _Config = None,
    assignments: _Set = None,
    split: _Split = None,
    sticky: _Sticky = None,
    shadow: _Shadow = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on, by default 127.0.0.1.")] = None,
    port: _Port = None,
    grpc_port: _GrpcPort = None,
    admin_port: _AdminPort = None,
    keys: _Keys = None,
    log_format: _LogFormat = None,
    access_log: _AccessLog = None,
    as_json: Annotated[bool, typer.Option("--json", help="Announce the URL as one JSON line.")] = False,
) -> None:
    """Serve registered models over HTTP: /predict, /v2 (Open Inference Protocol), /health, /metrics."""
    from fettle.cli._traffic import traffic_of
    from fettle.registry import Registry
    from fettle.serve.config import resolve
    from fettle.serve.logs import configure
    from fettle.serve.source import RegistryCatalogue, registry_source

    home = Home.default()
    registry = Registry(home)

    def source(reference: Reference) -> ModelSource:
        registry.get(reference)  # an unknown model is an error now, not a server that never becomes ready
        return registry_source(registry, reference)

    flags = {
        "models": models,
        "split": split,
        "sticky": sticky,
        "shadow": shadow,
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "admin_port": admin_port,
        "keys": keys,
        "log_format": log_format,
        "access_log": access_log,
    }
    words, options = resolve(_settings(home, config, flags, assignments or ()))
    if not words.models:
        raise UsageError("give at least one MODEL, here or in the file of --config as models = [...], got none")
    traffics = traffic_of(words.models, splits=words.split, sticky=words.sticky, shadows=words.shadow, source=source)
    configure(options.log_format)
    raise typer.Exit(_run(traffics, options, RegistryCatalogue(registry), as_json=as_json))


def _settings(
    home: Home, config: Path | None, flags: Mapping[str, object], assignments: Sequence[str]
) -> dict[str, Any]:
    """The home's defaults, over them what the file says, and over that what the command line says."""
    from fettle.serve.config import assigned, read_settings
    from fettle.serve.logs import format_for

    defaults = {"observations": home.observations("{model}"), "keys": home.keys if home.keys.exists() else None}
    # Typer gives an empty list for an option that may be repeated and was not given.
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in flags.items()
        if value is not None and value != []
    }
    beside = assigned(assignments)
    for key in beside:
        if key in given:
            flag = "MODEL" if key == "models" else f"--{key.replace('_', '-')}"
            raise UsageError(f"{key} is given twice, by {flag} and by --set")
    found = {**defaults, **({} if config is None else read_settings(config)), **given, **beside}
    return {**found, "log_format": format_for(found.get("log_format", "auto"), terminal=sys.stderr.isatty())}


def _run(traffics: Sequence[Traffic], options: ServeOptions, catalogue: Catalogue, *, as_json: bool) -> int:
    from fettle.serve.server import serve as run

    ports: dict[str, str] = {}
    return run(
        traffics,
        options=options,
        catalogue=catalogue,
        on_ready=partial(_announce, traffics, ports, as_json),
        on_grpc=partial(ports.__setitem__, "grpc"),
        on_admin=partial(ports.__setitem__, "admin"),
    )


def _announce(traffics: Sequence[Traffic], ports: Mapping[str, str], as_json: bool, url: str) -> None:
    """Say where what is served. ports: the addresses of the gRPC and the admin port, where there are any."""
    from fettle.cli._traffic import describe

    if as_json:
        labels = [one.label for traffic in traffics for one in traffic.variants]
        said = {"url": url, "model": labels[0], "models": labels}
        typer.echo(json.dumps({**said, **ports}))
    else:
        more = "".join(
            f", {what} on {ports[key]}" for key, what in (("grpc", "gRPC"), ("admin", "admin")) if key in ports
        )
        typer.echo(f"serving {describe(traffics)} on {url}{more}")
