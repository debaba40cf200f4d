"""Every check against one server: as values for a program, as lines for a person.

The exit code of the command is 0 where nothing failed, 1 where something did, 2 where nothing could be tried.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from fettle.testing.oip import binary, compression, infer, refusals, rest, rpc
from fettle.testing.oip.client import Skipped, Target, Unanswered, parse_json
from fettle.testing.oip.server import Server

Check = Callable[[Server], None]
Outcome = Literal["pass", "FAIL", "skipped"]

GROUPS: Mapping[str, tuple[Check, ...]] = {
    "rest": rest.CHECKS,
    "infer": infer.CHECKS,
    "refusals": refusals.CHECKS,
    "binary": binary.CHECKS,
    "compression": compression.CHECKS,
    "grpc": rpc.CHECKS,
}
CHECKS: tuple[Check, ...] = tuple(check for group in GROUPS.values() for check in group)
_OPTED_OUT = "left out by --skip"


class NotStarted(Exception):
    """Nothing can be tried: no server, no model, no such check."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found. message: the rule and what was got, or why it was skipped; "" where it passed."""

    group: str
    name: str
    outcome: Outcome
    message: str = ""

    def __str__(self) -> str:
        message = f": {' '.join(self.message.split())}" if self.message else ""
        return f"{self.outcome:8}{self.group}.{self.name}{message}"


def run_checks(server: Server, *, skip: Collection[str] = ()) -> Iterator[Result]:
    """Try every check, one after the other. skip: names of checks, or of whole groups, to leave out."""
    for group, checks in GROUPS.items():
        for check in checks:
            if group in skip or check.__name__ in skip:
                yield Result(group, check.__name__, "skipped", _OPTED_OUT)
            else:
                yield Result(group, check.__name__, *try_check(check, server))


def try_check(check: Check, server: Server) -> tuple[Outcome, str]:
    """The outcome of one check and its message. Whatever else it raises is a failure too."""
    try:
        check(server)
    except Skipped as reason:
        return "skipped", str(reason)
    except AssertionError as problem:
        return "FAIL", str(problem)
    except Exception as problem:  # an answer so odd that the check itself stumbles must not end the run
        return "FAIL", f"the answer could not be judged, {type(problem).__name__}: {problem}"
    return "pass", ""


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m fettle.testing.oip URL`: one line for each check on stdout."""
    options = _options(arguments)
    try:
        if not __debug__:
            raise NotStarted("python -O takes out the assertions that the checks are made of: run it without")
        server = _server(options)
        unknown = set(options.skip) - {*GROUPS, *(check.__name__ for check in CHECKS)}
        if unknown:
            raise NotStarted(f"--skip takes the name of a check or of a group, got {', '.join(sorted(unknown))}")
    except NotStarted as problem:
        sys.stderr.write(f"fettle.testing.oip: {problem}\n")
        return 2
    results = run_checks(server, skip=options.skip)
    return _print_json(server, results) if options.json else _print_lines(results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fettle.testing.oip",
        description="Try every rule of the Open Inference Protocol v2 on a running server.",
        epilog="Exit code: 0 nothing failed, 1 something did, 2 nothing could be tried.",
    )
    parser.add_argument("url", help="where the server is: http://HOST[:PORT], without /v2")
    parser.add_argument("--model", default="", help="the model to try; needed unless the server lists just one")
    parser.add_argument("--version", default="", help="its version; by default the server chooses")
    parser.add_argument("--token", default="", help="sent as Authorization: Bearer TOKEN")
    parser.add_argument("--grpc", default="", metavar="HOST:PORT", help="where it answers gRPC; else that is skipped")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave out a check or a group")
    parser.add_argument("--free", type=_count, default=1, help="size of free dimensions besides the first (1)")
    parser.add_argument("--timeout", type=_seconds, default=10.0, help="seconds for each request (10)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _seconds(text: str) -> float:
    if not (0 < (value := float(text)) < math.inf):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def _server(options: argparse.Namespace) -> Server:
    """The server to try. Raises NotStarted where there is none."""
    server = Server(
        options.url,
        model=options.model,
        version=options.version,
        token=options.token,
        timeout_s=options.timeout,
        free=options.free,
        grpc=options.grpc,
    )
    try:
        Target.parse(server.url)
        server.get("/v2/health/live")
    except (ValueError, Unanswered) as problem:
        raise NotStarted(str(problem)) from None
    if server.model:
        return server
    names = _listed(server)
    if len(names) != 1:
        found = f"it lists {', '.join(names)}" if names else "it does not list its models"
        raise NotStarted(f"name the model with --model: {found}")
    options.model = names[0]
    return _server(options)


def _listed(server: Server) -> list[str]:
    """The models that the repository extension names, which few servers have."""
    try:
        reply = server.request("POST", "/v2/repository/index", b"{}", {"Content-Type": "application/json"})
        listed = parse_json(reply.body, where="the index") if reply.status == 200 else []
    except AssertionError:
        return []
    entries = listed if isinstance(listed, list) else []
    names = {each.get("name") for each in entries if isinstance(each, dict)}
    return sorted(name for name in names if isinstance(name, str) and name)


def _print_lines(results: Iterable[Result]) -> int:
    counts: dict[Outcome, int] = {"pass": 0, "FAIL": 0, "skipped": 0}
    for result in results:
        counts[result.outcome] += 1
        sys.stdout.write(f"{result}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skipped']} skipped\n")
    return int(counts["FAIL"] > 0)


def _print_json(server: Server, results: Iterable[Result]) -> int:
    found = list(results)
    failed = sum(result.outcome == "FAIL" for result in found)
    document = {
        "url": server.url,
        "model": server.model,
        "version": server.version,
        "failed": failed,
        "results": [asdict(result) for result in found],
    }
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return int(failed > 0)
