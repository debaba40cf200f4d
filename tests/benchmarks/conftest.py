import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are scripts: they find each other because they lie in one folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("harness", "readme_tables", "engines", "ptq_peers", "ptq_cifar"):
        monkeypatch.delitem(sys.modules, name, raising=False)
