"""A worker's process: started with a socket to talk over, kept to a core, and ended."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence

from fettle.serve.priority import give_way

_log = logging.getLogger("fettle.serve")
_BUFFER_BYTES = 2**20


def start_process(
    command: Sequence[str], environment: Mapping[str, str], *, core: int | None, background: bool
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and our end of the socket; the descriptor of its end is put behind the command. Raises OSError.

    core: the only one it runs on, None for any. background: it takes what time others leave.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        ours.setblocking(False)
        number = theirs.fileno()
        try:
            process = subprocess.Popen(
                [*command, str(number)], pass_fds=[number], env=environment, stdin=subprocess.DEVNULL
            )
        except OSError:
            ours.close()
            raise
    if core is not None:
        keep_to_core(process.pid, core)
    if background:
        give_way(process.pid)
    return process, ours


def keep_to_core(pid: int, core: int) -> None:
    """Let a process run on this core only; threads that it starts from now on likewise."""
    try:
        os.sched_setaffinity(pid, {core})
    except OSError as problem:  # it has ended already, or the core was taken away
        _log.warning("process %d runs on any core: %s", pid, problem)


def end_process(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait for the process to end, and kill it after the timeout; its exit code."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
