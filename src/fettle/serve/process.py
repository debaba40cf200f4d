"""A worker's process: started with a socket to talk over, and ended."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping, Sequence

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


def end_process(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait for the process to end, and kill it after the timeout; its exit code."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
