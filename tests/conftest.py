"""A tiny project written as a user would write it, the command line run as a user would run it, one optimized home."""

from __future__ import annotations

import functools
import gc
import io
import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# An example that is slow on a busy machine is no fault.
settings.register_profile("fettle", deadline=None)
settings.load_profile("fettle")

# Two workers share two cores: threads of torch would only wait for each other. Read by torch as it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: beside the last of them, one of two workers would have nothing left to do.

    xdist would begin with the files of most tests; `--no-loadscope-reorder` makes it keep to this order.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Ten thousand tests and torch live to the end: looking them through for garbage takes a fifth of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


TOML = """
name = "tiny"
[model]
build = "model:build"
example = "model:example"
[data]
train = "data:train"
validation = "data:validation"
test = "data:test"
[task]
metric = "accuracy"
classes = ["a", "b", "c"]
[budget]
max_drop = 0.05
"""

MODEL = """
import torch
from torch import nn


def example():
    return (torch.zeros(1, 6),)


def build():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    return model.eval()
"""

# Labels are what a fixed linear rule says, so an untrained model is far from perfect and far from constant.
DATA = """
import numpy as np


def rows(count, seed):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, 6)).astype(np.float32)
    y = (x[:, :3] - x[:, 3:]).argmax(axis=1)
    return [(x[i : i + 20], y[i : i + 20]) for i in range(0, count, 20)]


def train():
    return rows(80, 0)


def validation():
    return rows(60, 1)


def test():
    return rows(60, 2)
"""


@dataclass(frozen=True)
class Ran:
    """What one command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, code: int) -> str:
        """The one line on stderr of a command that must be refused with this code."""
        assert self.code == code, (self.code, self.err[-2000:])
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("fettle: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def _text(default: str, given: str | dict[str, str]) -> str:
    """The text given, or the default with some parts replaced."""
    if isinstance(given, str):
        return given
    for old, new in given.items():
        assert old in default, old
        default = default.replace(old, new)
    return default


def _write_project(
    folder: Path,
    *,
    toml: str | dict[str, str] | None = None,
    model: str | dict[str, str] | None = None,
    data: str | dict[str, str] | None = None,
) -> Path:
    """Each file is the default one, a whole text, or the default with {old: new}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, default, given in (("fettle.toml", TOML, toml), ("model.py", MODEL, model), ("data.py", DATA, data)):
        (folder / name).write_text(_text(default, {} if given is None else given))
    return folder


def _run(*arguments: object, home: Path) -> Ran:
    """The command line in this process."""
    from fettle.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("FETTLE_HOME", str(home))
        patch.setattr(sys, "argv", ["fettle", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ran(code, out.getvalue(), err.getvalue())


def _process(*arguments: object, home: Path, before: str = "", timeout_s: float = 120) -> Ran:
    """The command line in a process of its own; `before` is Python to run first."""
    code = f"{before}\nfrom fettle.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "FETTLE_HOME": str(home)},
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Tiny:
    """The tiny project, optimized once in every runtime; `home` is to be read, or copied and then changed."""

    home: Path
    project: Path
    ran: Ran


@pytest.fixture(scope="session")
def write_project() -> Callable[..., Path]:
    return _write_project


@pytest.fixture(scope="session")
def run() -> Callable[..., Ran]:
    return _run


@pytest.fixture(scope="session")
def process() -> Callable[..., Ran]:
    return _process


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    project = _write_project(root / "project")
    ran = _run("optimize", project, "--json", home=root / "home")
    assert ran.code == 0, ran.err[-3000:]
    return Tiny(root / "home", project, ran)


@pytest.fixture
def float_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager has float alone, as on a processor without bfloat16: the baseline is not measured against its half."""
    from fettle.runtime.eager import Eager

    monkeypatch.setattr(Eager, "precisions", frozenset({"float"}))


@pytest.fixture
def eager_only(monkeypatch: pytest.MonkeyPatch, float_in_eager: None) -> None:
    """Only the baseline is built: a whole run in a second."""
    from fettle.runtime.eager import Eager

    monkeypatch.setattr("fettle.core.plugins.installed", lambda package, base: {"eager": Eager})


@pytest.fixture(scope="session", autouse=True)
def onnx_functions_once():
    """torch parses its five hundred ONNX functions anew for every file it writes: half of the time of a small one."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        read = functools.cache(ONNXRegistry.from_torchlib.__func__)
        patch.setattr(ONNXRegistry, "from_torchlib", classmethod(read))
        yield


@pytest.fixture(scope="session", autouse=True)
def operations_once():
    """For each export torch lists the operations of every namespace anew, and writes 11,000 types that nobody reads.

    One list is enough, and `typing` remembers its types where `collections.abc` makes them anew: 40 ms less of 150 to
    400.
    """
    import torch  # most tests do without
    from torch._export import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))
        patch.setattr(torch._ops, "Callable", typing.Callable)
        yield


@pytest.fixture
def one_thread():
    """For folders whose tests of torch are many and small."""
    import torch  # most tests do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator():
    """A generator of torch with a fixed seed."""
    import torch

    return torch.Generator().manual_seed(0)
