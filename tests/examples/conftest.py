"""The examples are projects, so they are opened as projects: their `model` and `data` shadow each other otherwise."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fettle.core.project import Project

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def open_example() -> Iterator[Callable[[str], Project]]:
    """Opens `examples/NAME`; the modules it imported are forgotten afterwards."""
    before = dict(sys.modules)
    yield lambda name: Project.open(EXAMPLES / name)
    for name in ("model", "data"):
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


@pytest.fixture
def module_of(open_example: Callable[[str], Project]) -> Callable[[str, str], ModuleType]:
    """A module of an example, such as `module_of("encoder", "model")`."""

    def find(example: str, module: str) -> ModuleType:
        project = open_example(example)
        project.resolve("model.build", project.file.model.build)
        project.resolve("data.validation", project.file.data.validation)
        return sys.modules[module]

    return find
