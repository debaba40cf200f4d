"""A worker's process: started with a socket to talk over, put behind others, and ended."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence

_log = logging.getLogger("fettle.serve")
_BUFFER_BYTES = 2**20


def start_process(
    command: Sequence[str], environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and our end of the socket; the descriptor of its end is put behind the command. Raises OSError."""
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
    return process, ours


def give_way(pid: int) -> None:
    """Let a process run only where no other wants the core; threads that it starts from now on are the same.

    From here, as soon as it exists: where it did so itself, it would have loaded its libraries by then.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, pid, 19)
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    except OSError as problem:  # it has ended already, or a container forbids it
        _log.warning("process %d keeps its priority: %s", pid, problem)


def end_process(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait for the process to end, and kill it after the timeout; its exit code."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
