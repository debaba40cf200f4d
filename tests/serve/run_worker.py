"""A worker process that knows the runtime of these tests: `python run_worker.py DESCRIPTOR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_server import runtime_in_place

from fettle.serve.worker import main

if __name__ == "__main__":
    with runtime_in_place():
        main(int(sys.argv[1]))
