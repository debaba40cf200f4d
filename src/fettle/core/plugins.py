"""Plug-ins are found by file name: a new method is one new file, and no list names it.

A concept is a package (`fettle.runtime`); each of its modules (not its sub-packages) whose name has no leading
underscore holds exactly one public subclass of the concept's base class, and is the plug-in of that name. A
missing optional dependency, imported plainly at the top of that file, becomes `MissingExtra`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import TypeVar

from fettle.core.codec import nearest
from fettle.core.errors import MissingExtra, UsageError

T = TypeVar("T")

# Which pip extra brings an importable module that a base install does not have.
_EXTRAS = {
    "torch": "optimize",
    "onnx": "optimize",
    "onnx_ir": "optimize",
    "onnxscript": "optimize",
    "matplotlib": "optimize",
    "openvino": "openvino",
    "sklearn": "demo",
    "opentelemetry": "otel",
    "grpc": "grpc",
    "google": "grpc",
}


def names(package: str) -> list[str]:
    """The plug-ins of a concept, by file name, installed or not.

    >>> names("fettle.monitor.alerts")
    ['log', 'webhook']
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise UsageError(f"'{package}' is no package of plug-ins")
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in found if not module.ispkg and not module.name.startswith("_"))


def load(package: str, name: str, base: type[T]) -> type[T]:
    """The plug-in class called `name`.

    Raises UsageError for an unknown name and MissingExtra where its dependency is not installed.
    """
    known = names(package)
    concept = package.rpartition(".")[2]
    if name not in known:
        raise UsageError(f"unknown {concept} '{name}'{nearest(name, known)}")
    try:
        module = importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as problem:
        raise missing_extra(f"{concept} '{name}'", problem) from None
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise TypeError(f"{package}.{name} must hold exactly one {base.__name__}, found {len(classes)}")
    return classes[0]


def missing_extra(what: str, problem: ModuleNotFoundError) -> MissingExtra:
    """The error for a module that is not installed; anything that is no extra of ours is raised as it is."""
    module = (problem.name or "").partition(".")[0]
    if module not in _EXTRAS:
        raise problem
    return MissingExtra(f"{what} needs {module}: pip install 'fettle-ml[{_EXTRAS[module]}]'")


def installed(package: str, base: type[T]) -> dict[str, type[T]]:
    """The plug-ins of a concept whose dependencies are installed."""
    found = {}
    for name in names(package):
        try:
            found[name] = load(package, name, base)
        except MissingExtra:
            continue
    return found
