"""A worker that spoils one report: as soon as the file named by FETTLE_TEST_LIE is there, as its text says."""

import os
import sys
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent))

from run_server import runtime_in_place

from fettle.serve import wire
from fettle.serve.worker import Worker, main

LIE = Path(os.environ.get("FETTLE_TEST_LIE", "/nonexistent"))
say = Worker._say


def spoiled(lie, done):
    if lie == "id":
        return msgspec.structs.replace(done, id=done.id - 1)
    first, *rest = done.outcomes
    return msgspec.structs.replace(done, outcomes=[msgspec.structs.replace(first, size=first.size + 1), *rest])


def say_or_lie(worker, report, body=b""):
    if isinstance(report, wire.Done):
        try:
            lie = LIE.read_text()
            LIE.unlink()
        except FileNotFoundError:
            pass
        else:
            report = spoiled(lie, report)
    say(worker, report, body)


if __name__ == "__main__":
    Worker._say = say_or_lie
    with runtime_in_place():
        main(int(sys.argv[1]))
