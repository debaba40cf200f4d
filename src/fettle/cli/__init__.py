"""The command line: thin; each command parses, calls one public function and prints what it returns.

Exit code 0 is success, 1 a gate that was not met or a failure explained on stderr, 2 wrong usage.
"""

from __future__ import annotations

import sys

import typer

from fettle.cli import demo, doctor, keys, monitor, optimize, quantize, registry, serve
from fettle.core.errors import FettleError

app = typer.Typer(
    help="From a trained PyTorch model to a small, fast, watched service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("optimize")(optimize.optimize)
app.command("quantize")(quantize.quantize)
app.command("compare")(registry.compare)
app.add_typer(registry.app, name="registry")
app.command("serve")(serve.serve)
app.add_typer(keys.app, name="keys")
app.add_typer(monitor.app, name="monitor")
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; every error of ours is one line on stderr and its own exit code."""
    try:
        app()
    except FettleError as problem:
        sys.stderr.write(f"fettle: {problem}\n")
        sys.exit(problem.exit_code)
    except OSError as problem:  # the disk is full, a folder is not ours: nothing a traceback would explain
        what = f"{problem.filename}: " if problem.filename else ""
        sys.stderr.write(f"fettle: {what}{problem.strerror or problem}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
