"""Runs in fettle's own environment: `fettle serve` on one artifact's folder, with its defaults.

usage: fettle_server.py PORT FOLDER [OBSERVATIONS]
"""

import sys
from pathlib import Path

from fettle.serve.options import ServeOptions
from fettle.serve.server import serve
from fettle.serve.source import FolderSource


def main(port: str, folder: str, observations: str | None = None) -> int:
    options = ServeOptions(port=int(port), observations=None if observations is None else Path(observations))
    return serve(FolderSource("resnet20", Path(folder)), options=options)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
