"""`fettle serve`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fettle.core.home import Home
from fettle.core.names import Reference

if TYPE_CHECKING:
    from fettle.serve.models import Catalogue
    from fettle.serve.options import ServeOptions
    from fettle.serve.source import ModelSource
    from fettle.serve.traffic import Traffic


# What needs more than a line to say.
_Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="NAME, NAME@alias (followed when it moves) or NAME:version, of each model. /predict is the first.",
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
_LogFormat = Annotated[
    str, typer.Option(help="Of the lines on stderr: text, json, or auto: text on a terminal, else json.")
]
_Trace = Annotated[
    bool, typer.Option("--trace", help="Send spans to the OpenTelemetry collector that OTEL_* names; extra otel.")
]

_Keys = Annotated[
    Path | None, typer.Option(help="API keys to ask for (`fettle keys`), by default keys.json in FETTLE_HOME, if any.")
]
_Certificate = Annotated[Path | None, typer.Option(help="PEM file: speak TLS on all ports.")]
_CertificateKey = Annotated[Path | None, typer.Option(help="PEM file: the certificate's key.")]
_ClientCa = Annotated[Path | None, typer.Option(help="PEM file: clients must show a certificate of this authority.")]
_AdminPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Load and unload models here, with an admin key.")
]
_AdminName = Annotated[
    list[str] | None, typer.Option(help="Further host name by which the admin port may be called. May be repeated.")
]


def serve(
    models: _Models,
    split: _Split = None,
    sticky: _Sticky = None,
    shadow: _Shadow = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8080,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Of gRPC; 0 for a free one.")] = None,
    keys: _Keys = None,
    tls_certificate: _Certificate = None,
    tls_key: _CertificateKey = None,
    tls_client_ca: _ClientCa = None,
    admin_port: _AdminPort = None,
    admin_host: Annotated[str, typer.Option(help="Address of the admin port.")] = "127.0.0.1",
    admin_name: _AdminName = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one inference.")] = 1,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to serve on after SIGTERM before draining.")] = 0.0,
    log: Annotated[bool, typer.Option(help="Write the prediction log.")] = True,
    log_format: _LogFormat = "auto",
    access_log: Annotated[bool, typer.Option("--access-log", help="One line on stderr for each request.")] = False,
    trace: _Trace = False,
    as_json: Annotated[bool, typer.Option("--json", help="Announce the URL as one JSON line.")] = False,
) -> None:
    """Serve registered models over HTTP: /predict, /v2 (Open Inference Protocol), /health, /metrics."""
    from fettle.cli._traffic import traffic_of
    from fettle.registry import Registry
    from fettle.serve.logs import configure, format_for
    from fettle.serve.options import ServeOptions
    from fettle.serve.source import RegistryCatalogue, registry_source

    home = Home.default()
    registry = Registry(home)

    def source(reference: Reference) -> ModelSource:
        registry.get(reference)  # an unknown model is an error now, not a server that never becomes ready
        return registry_source(registry, reference)

    traffics = traffic_of(models, splits=split or (), sticky=sticky, shadows=shadow or (), source=source)
    form = format_for(log_format, terminal=sys.stderr.isatty())
    options = ServeOptions(
        host=host,
        port=port,
        grpc_port=grpc_port,
        threads=threads,
        grace_s=grace,
        observations=home.observations("{model}") if log else None,
        keys=keys or (home.keys if home.keys.exists() else None),
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        admin_port=admin_port,
        admin_host=admin_host,
        admin_names=tuple(admin_name or ()),
        access_log=access_log,
        trace=trace,
        log_format=form,
    )
    configure(form)
    raise typer.Exit(_run(traffics, options, RegistryCatalogue(registry), as_json=as_json))


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
