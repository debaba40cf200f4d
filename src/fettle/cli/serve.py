"""`fettle serve`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fettle.core.home import Home
from fettle.core.names import Reference


def serve(
    model: Annotated[str, typer.Argument(help="NAME, NAME@alias (followed when it moves) or NAME:version.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8080,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one inference.")] = 1,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to serve on after SIGTERM before draining.")] = 0.0,
    log: Annotated[bool, typer.Option(help="Write the prediction log.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Announce the URL as one JSON line.")] = False,
) -> None:
    """Serve a registered model over HTTP: /predict, /v2 (Open Inference Protocol), /health, /metrics."""
    from fettle.registry import Registry
    from fettle.serve.options import ServeOptions
    from fettle.serve.server import serve as run
    from fettle.serve.source import registry_source

    home, reference = Home.default(), Reference.parse(model)
    registry = Registry(home)
    registry.get(reference)  # an unknown model is an error now, not a server that never becomes ready
    options = ServeOptions(
        host=host,
        port=port,
        threads=threads,
        grace_s=grace,
        observations=home.observations(reference.name) if log else None,
    )

    def announce(url: str) -> None:
        typer.echo(json.dumps({"url": url, "model": str(reference)}) if as_json else f"serving {reference} on {url}")

    raise typer.Exit(run(registry_source(registry, reference), options=options, on_ready=announce))
