import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are scripts: they find each other because they lie in one folder. Each test imports them anew."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    scripts = {path.stem for path in BENCHMARKS.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in scripts]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def serve() -> ModuleType:
    return importlib.import_module("serve")
