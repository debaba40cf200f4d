"""`fettle doctor`."""

from __future__ import annotations

from fettle.cli.output import AsJson, console, print_json
from fettle.core import plugins
from fettle.core.errors import MissingExtra
from fettle.core.home import Home
from fettle.core.machine import describe_hardware, describe_versions
from fettle.core.runner import RuntimeBase


def doctor(as_json: AsJson = False) -> None:
    """What is installed and what this machine can do."""
    runtimes = {}
    for name in plugins.names("fettle.runtime"):
        try:
            found = plugins.load("fettle.runtime", name, RuntimeBase)
            runtimes[name] = f"ready: {', '.join(sorted(found.precisions))}"
        except MissingExtra as problem:
            runtimes[name] = str(problem)
    facts = {
        "hardware": describe_hardware(),
        "home": str(Home.default().root),
        "versions": describe_versions(),
        "runtimes": runtimes,
    }
    if as_json:
        print_json(facts)
        return
    out = console()
    for key, value in facts.items():
        lines = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else [value]
        for index, line in enumerate(lines):
            out.print(f"{key if index == 0 else '':10} {line}", markup=False)
