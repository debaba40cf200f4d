"""Calls of a registry in children forked from this process: it has one thread and few pages, unlike that of the tests.

Each question on stdin is pickled: the home, the calls, the line to be killed at (or 0), and whether root's rights go.
Each answer on stdout is pickled: how the child ended, and what each call returned or raised.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import fettle.registry
from fettle.core.home import Home
from fettle.registry import Registry

SOURCE = str(Path(fettle.registry.__file__).parent)
NOBODY = 65534


def kill_at(line: int) -> None:
    """Send this process SIGKILL before the given line of registry code it comes to."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        seen += event == "line"
        if seen == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def outcome(call: Callable[[Registry], object], registry: Registry) -> object:
    try:
        return call(registry)
    except Exception as problem:
        return problem


def child(root: Path, calls: tuple[Callable[[Registry], object], ...], line: int, *, unprivileged: bool) -> bytes:
    registry = Registry(Home(root))
    if unprivileged and os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if line:
        kill_at(line)
    outcomes = [outcome(call, registry) for call in calls]
    sys.settrace(None)
    return pickle.dumps(outcomes)


def forked(act: Callable[[], bytes]) -> tuple[int, bytes]:
    """The wait status of a child that does it, and what it gave."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(act())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        given = pipe.read()
    return os.waitpid(pid, 0)[1], given


def main() -> None:
    while True:
        try:
            root, calls, line, unprivileged = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        status, given = forked(partial(child, root, calls, line, unprivileged=unprivileged))
        pickle.dump((status, pickle.loads(given) if given else []), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
