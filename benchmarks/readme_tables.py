"""Write the tables of `benchmarks/results/NAME.json` between the README's markers `<!-- NAME -->` and `<!-- /NAME -->`.

The README holds no number of its own: whoever runs a benchmark again runs this after it.
With `--check` nothing is written, and the exit code is 1 where the README does not match the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import ROOT, Table

MARKER = re.compile(r"<!-- (?P<slash>/?)(?P<name>[a-z0-9_]+) -->")


class TablesError(Exception):
    """The README or a result cannot be used; the message says which and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the README is stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    try:
        before = read(options.readme)
        after = fill(before, options.results)
    except TablesError as problem:
        print(problem, file=sys.stderr)
        return 1
    if before == after:
        return 0
    if options.check:
        print(f"{options.readme} is stale: run python benchmarks/readme_tables.py", file=sys.stderr)
        return 1
    options.readme.write_text(after, encoding="utf-8")
    return 0


def fill(readme: str, results: Path) -> str:
    """The README with the text between each pair of markers replaced. Raises TablesError."""
    parts, end = [], 0
    for opening, closing in pairs(readme):
        body = render(json_of(results / f"{opening['name']}.json"))
        parts += [readme[end : opening.end()], "\n", body, "\n"]
        end = closing.start()
    return "".join([*parts, readme[end:]])


def pairs(readme: str) -> list[tuple[re.Match[str], re.Match[str]]]:
    """Opening and closing markers in order. Raises TablesError unless they alternate and match."""
    found = list(MARKER.finditer(readme))
    openings, closings = found[::2], found[1::2]
    for opening, closing in zip(openings, [*closings, None], strict=False):
        matched = closing is not None and closing["slash"] and closing["name"] == opening["name"]
        if opening["slash"] or not matched:
            raise TablesError(f"the README's markers must be opened and closed in turn, got {opening.group()} alone")
    return list(zip(openings, closings, strict=True))


def render(result: dict[str, Any]) -> str:
    """One result as Markdown: its tables, the peers that are missing, the verdict, and where it was measured.

    >>> table = {"title": "Speed", "columns": ["system", "ms"], "rows": [["ours", "1.5"]]}
    >>> machine = {"processor": "Zen", "cores": "2", "torch": "2.13.0"}
    >>> result = {"tables": [table], "missing": {}, "verdict": "CLAIM holds: 1.5 ms", "machine": machine}
    >>> print(render({**result, "time": "2026-01-02T03:04:05+00:00", "quick": False}))
    **Speed**
    <BLANKLINE>
    | system | ms |
    | --- | ---: |
    | ours | 1.5 |
    <BLANKLINE>
    CLAIM holds: 1.5 ms
    <BLANKLINE>
    Measured 2026-01-02 on Zen, 2 cores; torch 2.13.0.
    """
    tables = [
        Table(table["title"], tuple(table["columns"]), tuple(tuple(row) for row in table["rows"])).markdown()
        for table in result["tables"]
    ]
    missing = [f"Missing: {name} ({reason})." for name, reason in result["missing"].items()]
    machine = dict(result["machine"])
    place = f"Measured {result['time'][:10]} on {machine.pop('processor')}, {machine.pop('cores')} cores"
    machine.pop("load", None)
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    quick = " A quick run, not a full one." if result["quick"] else ""
    return "\n\n".join([*tables, *missing, result["verdict"], f"{place}; {versions}.{quick}"])


def json_of(path: Path) -> dict[str, Any]:
    """The result in this file. Raises TablesError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TablesError(
            f"the README has a marker for {path.stem}, but {path} does not exist: "
            f"run python benchmarks/{path.stem}.py --json {path}"
        ) from None
    except ValueError as problem:
        raise TablesError(f"{path} must be JSON as the benchmark writes it: {problem}") from None
    wanted = {"tables", "missing", "machine", "time", "verdict", "quick"}
    if not isinstance(found, dict) or not wanted <= found.keys():
        raise TablesError(f"{path} must be a result with {', '.join(sorted(wanted))}: run the benchmark again")
    return found


def read(path: Path) -> str:
    """The README's text. Raises TablesError where it is not there."""
    if not path.is_file():
        raise TablesError(f"{path} does not exist: name the README with --readme")
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
