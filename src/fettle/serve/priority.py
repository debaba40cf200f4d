"""Who runs first where every core computes: the front, which says no at once; then workers; shadows in what is left.

All of it asks the system for something it may refuse or not know, as in a container or on an older kernel: then the
order is looser, and nothing else changes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct

_log = logging.getLogger("fettle.serve")
# Of workers, behind the front. At 5 refusals came 1.6 times as late (p99), at 15 no sooner than at 10.
_NICENESS = 10
# Who asks for little at a time may, since Linux 6.12, interrupt whoever has the core when it wakes, and waits for the
# end of a slice of 3 ms otherwise. It gets no larger share of the time by that.
_SHORT_SLICE_NS = 100_000
_PROMPT_S = 1.0
_SYSTEM_CALLS = {"x86_64": 314, "aarch64": 274}
# struct sched_attr: size, policy, flags, nice, priority, and three times, of which the first is the slice.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")


class Promptness:
    """Of the front: while it refuses, it runs as soon as it wakes, for what it says is wanted at once.

    Not always: requests that are read one by one go to the workers in smaller batches, and an interrupted worker finds
    its caches cold. Throughput without overload is 5 to 15 % less then. Belongs to the thread that calls it.
    """

    def __init__(self) -> None:
        self._until = 0.0

    def refused(self, now: float) -> None:
        """A request was refused for want of time. now: on a clock of the caller, in seconds."""
        if not self._until:
            _ask_slice(_SHORT_SLICE_NS)
        self._until = now + _PROMPT_S

    def look(self, now: float) -> None:
        """Be as others again where nothing was refused for a while. Call it a few times a second."""
        if self._until and now > self._until:
            _ask_slice(0)
            self._until = 0.0


def come_second() -> None:
    """Let the calling process leave the cores to the front. What it inherited from the front is undone."""
    os.nice(_NICENESS)
    _ask_slice(0)


def give_way(pid: int) -> None:
    """Let a process run only where no other wants the core; threads that it starts from now on are the same.

    From outside, as soon as it exists: where it did so itself, it would have loaded its libraries by then.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, pid, 19)
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    except OSError as problem:  # it has ended already, or a container forbids it
        _log.warning("process %d keeps its priority: %s", pid, problem)


def _ask_slice(nanoseconds: int) -> bool:
    """Ask the scheduler for slices of this length for the calling thread, 0 for its own choice; whether it took it.

    See sched_setattr(2), and `sched_runtime` in the kernel's documentation of its EEVDF scheduler.
    """
    number = _SYSTEM_CALLS.get(platform.machine())
    if number is None or platform.system() != "Linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    size, policy, niceness = _ATTRIBUTES.size, os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0)
    asked = _ATTRIBUTES.pack(size, policy, 0, niceness, 0, nanoseconds, 0, 0)
    system_call = ctypes.CDLL(None).syscall
    return bool(system_call(ctypes.c_long(number), ctypes.c_int(0), asked, ctypes.c_uint(0)) == 0)
