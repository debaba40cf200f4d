"""Where state lives: `FETTLE_HOME`, by default `.fettle/` in the working directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Home:
    """The layout of the state folder. Nothing is created until something is written.

    >>> Home(Path("/srv/fettle")).observations("digits").as_posix()
    '/srv/fettle/observations/digits'
    """

    root: Path

    @classmethod
    def default(cls) -> Home:
        """`$FETTLE_HOME` where it is set, else `.fettle` in the working directory."""
        return cls(Path(os.environ.get("FETTLE_HOME") or ".fettle").absolute())

    @property
    def database(self) -> Path:
        """The registry's SQLite file."""
        return self.root / "registry.db"

    @property
    def blobs(self) -> Path:
        """Content-addressed files: `blobs/<first two digits>/<sha-256>`."""
        return self.root / "blobs"

    @property
    def runs(self) -> Path:
        """One folder for each run of `fettle optimize`: candidates and the report."""
        return self.root / "runs"

    @property
    def incidents(self) -> Path:
        """The monitor's open incidents."""
        return self.root / "incidents"

    @property
    def keys(self) -> Path:
        """The API keys that `fettle serve` asks for, where there are any."""
        return self.root / "keys.json"

    def observations(self, name: str) -> Path:
        """The prediction log of one model: a folder of Parquet files."""
        return self.root / "observations" / name
