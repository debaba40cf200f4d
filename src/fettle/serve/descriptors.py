"""File descriptors: as many as the system allows, and no more connections than they are enough for."""

from __future__ import annotations

import errno
import resource

# For workers being replaced, the prediction log, and connections that are about to be refused.
RESERVED = 64
# What ends by itself: whoever meets it tries again, and blames nobody.
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOBUFS})


def room_for(connections: int) -> int:
    """How many of so many connections this process can have open, after raising its soft limit as far as needed.

    >>> room_for(10)
    10
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVED
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - RESERVED))
