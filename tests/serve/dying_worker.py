"""A worker that gets a signal when it is told to load a version.

The file named by FETTLE_TEST_DEATH says which, `{"version": 2, "signal": 9, "times": 1}`, for all workers together.
"""

import fcntl
import json
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_server import runtime_in_place

from fettle.serve.worker import Worker, main

DEATH = Path(os.environ.get("FETTLE_TEST_DEATH", "/nonexistent"))
load = Worker._load


def due(version):
    """Whether this load is one to die of, and count it."""
    with DEATH.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        wanted = json.load(file)
        if version != wanted["version"] or not wanted["times"]:
            return None
        file.seek(0)
        file.truncate()
        json.dump({**wanted, "times": wanted["times"] - 1}, file)
        return wanted["signal"]


def load_or_die(worker, order):
    number = due(order.version)
    if number is not None:
        os.kill(os.getpid(), number)
        threading.Event().wait()  # another thread may take the signal, and this one would load meanwhile
    load(worker, order)


if __name__ == "__main__":
    Worker._load = load_or_die
    with runtime_in_place():
        main(int(sys.argv[1]))
