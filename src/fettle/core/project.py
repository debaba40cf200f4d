"""`fettle.toml`: where the user's model, data and wishes are written down.

The names it holds are those of the user's own callables, "module:function", looked up beside the file.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fettle.core import codec
from fettle.core.errors import ProjectError
from fettle.core.names import check_name
from fettle.core.recipe import Budget
from fettle.core.signature import ImagePreprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """`build` returns the trained nn.Module; `example` a tuple of example inputs, batch first."""

    build: str
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """Each returns an iterable of (inputs, targets) batches; only validation is required."""

    validation: str
    train: str | None = None
    test: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSection:
    """`metric`: a known name, or "module:function" of (outputs, targets) arrays; `classes`: names in order."""

    metric: str = "accuracy"
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSection:
    """Declared once, run by the server without torch."""

    image: ImagePreprocess | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSection(Budget):
    """The budget, and the seed of everything random."""

    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectFile:
    """`fettle.toml` as it is written."""

    name: str
    model: ModelSection
    data: DataSection
    task: TaskSection = TaskSection()
    preprocess: PreprocessSection = PreprocessSection()
    budget: BudgetSection = field(default_factory=BudgetSection)


@dataclass(frozen=True, slots=True)
class Project:
    """A project file with its folder."""

    file: ProjectFile
    path: Path

    @classmethod
    def open(cls, path: Path) -> Project:
        """Read `fettle.toml`, or the one in this folder. Raises ProjectError naming file, key and what to do."""
        path = path / "fettle.toml" if path.is_dir() else path
        if not path.is_file():
            raise ProjectError(f"{path} does not exist: write it, or name another with `fettle optimize PATH`")
        data = codec.from_toml(path.read_bytes(), where=str(path), error=ProjectError)
        try:
            file = codec.from_json(ProjectFile, data, where=str(path), error=ProjectError)
        except ProjectError:
            raise
        except Exception as problem:
            raise ProjectError(f"{path}: {problem}") from None
        check_name(file.name, what=f"{path}: name", error=ProjectError)
        return cls(file, path.absolute())

    @property
    def name(self) -> str:
        """The model's name in the registry."""
        return self.file.name

    def resolve(self, key: str, reference: str) -> Callable[..., Any]:
        """The callable named `reference` ("module:function") under `key` ("model.build").

        Raises ProjectError for a missing module or function, and for a module that raises on import.
        """
        where = f'{self.path}: {key} = "{reference}"'
        module_name, colon, function = reference.partition(":")
        if not colon or not function.isidentifier() or not all(p.isidentifier() for p in module_name.split(".")):
            raise ProjectError(f'{where}: must be "module:function", where module is a file beside fettle.toml')
        with self._imports():
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as problem:
                missing = problem.name or module_name
                if missing == module_name.partition(".")[0]:
                    advice = f"no file {missing}.py beside fettle.toml and no installed module of that name"
                    raise ProjectError(f"{where}: {advice}") from None
                raise ProjectError(f"{where}: needs the module '{missing}', which is not installed") from None
            except Exception as problem:
                raise ProjectError(f"{where}: importing it raised {type(problem).__name__}: {problem}") from problem
        found = getattr(module, function, None)
        if not callable(found):
            public = [name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_")]
            raise ProjectError(f"{where}: {module_name} has no callable '{function}'{codec.nearest(function, public)}")
        return found  # type: ignore[no-any-return]

    def call(self, key: str, reference: str) -> Any:
        """Call it without arguments. Raises ProjectError where it raises."""
        function = self.resolve(key, reference)
        with self._imports():
            try:
                return function()
            except Exception as problem:
                where = f'{self.path}: {key} = "{reference}"'
                raise ProjectError(f"{where}: calling it raised {type(problem).__name__}: {problem}") from problem

    @contextmanager
    def _imports(self) -> Iterator[None]:
        """Let imports find the files beside fettle.toml, ahead of a same-named module of another project."""
        folder = str(self.path.parent)
        for name in {Path(entry).stem for entry in self.path.parent.glob("*.py")}:
            loaded = getattr(sys.modules.get(name), "__file__", None)
            if loaded is not None and Path(loaded).parent != self.path.parent:
                del sys.modules[name]
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(folder)
