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
# Of workers, behind the front.
_NICENESS = 5
# The front asks for little at a time, which since Linux 6.12 lets it interrupt whoever has the core when it wakes; it
# would wait for the end of a worker's slice of 3 ms otherwise. It gets no larger share of the time by that.
_FRONT_SLICE_NS = 100_000
_SYSTEM_CALLS = {"x86_64": 314, "aarch64": 274}
# struct sched_attr: size, policy, flags, nice, priority, and three times, of which the first is the slice.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")


def be_prompt() -> None:
    """Let the calling thread run soon after it wakes."""
    _ask_slice(_FRONT_SLICE_NS)


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
