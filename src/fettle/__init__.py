"""fettle: from a trained PyTorch model to a small, fast, watched service. Importing it does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fettle.core.artifact import Artifact
from fettle.core.errors import FettleError
from fettle.core.home import Home
from fettle.core.project import Project
from fettle.core.recipe import Budget, Recipe
from fettle.core.report import Measurement, Report
from fettle.core.runner import Runner
from fettle.core.signature import ImagePreprocess, Signature, TensorSpec

if TYPE_CHECKING:
    from fettle.pipeline import Outcome, optimize
    from fettle.registry import Registry

# Names whose modules cost too much to import before they are asked for; `pipeline` needs torch.
_LATE = {"Outcome": "fettle.pipeline", "optimize": "fettle.pipeline", "Registry": "fettle.registry"}

__all__ = [
    "Artifact",
    "Budget",
    "FettleError",
    "Home",
    "ImagePreprocess",
    "Measurement",
    "Outcome",
    "Project",
    "Recipe",
    "Registry",
    "Report",
    "Runner",
    "Signature",
    "TensorSpec",
    "load",
    "optimize",
]


def load(reference: str, *, threads: int = 1, home: Home | None = None) -> Runner:
    """The runner of a registered version: "digits", "digits@champion" or "digits:3".

    Raises NotRegistered, CorruptArtifact, and MissingExtra where its runtime is not installed.
    """
    from fettle.registry import Registry

    return Registry(home or Home.default()).open(reference).load(threads=threads)


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'fettle' has no attribute '{name}'")
    from fettle.core.plugins import missing_extra

    try:
        return getattr(importlib.import_module(_LATE[name]), name)
    except ModuleNotFoundError as problem:
        raise missing_extra(f"fettle.{name}", problem) from None


def __dir__() -> list[str]:
    return sorted(__all__)
