"""Small sealed artifacts and a home of their own for every test."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fettle.core.artifact import Artifact, Manifest
from fettle.core.home import Home
from fettle.core.recipe import Recipe
from fettle.core.report import Measurement, Report
from fettle.core.signature import Signature, TensorSpec
from fettle.registry import Registry

MakeArtifact = Callable[..., Artifact]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def registry(home: Home) -> Registry:
    return Registry(home)


@pytest.fixture
def make_artifact(tmp_path: Path) -> MakeArtifact:
    """An artifact whose model file is random bytes of this seed; the same seed gives the same digest."""
    count = 0

    def make(seed: int = 0, *, size_bytes: int = 2000, provenance: dict[str, str] | None = None) -> Artifact:
        nonlocal count
        count += 1
        root = tmp_path / "made" / str(count)
        root.mkdir(parents=True)
        (root / "model.bin").write_bytes(np.random.default_rng(seed).bytes(size_bytes))
        (root / "shared.json").write_text('{"the same": "in every artifact"}')
        signature = Signature(
            inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 2)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
        )
        manifest = Manifest(
            runtime="null",
            precision="int8" if seed % 2 else "float",
            signature=signature,
            files=(),
            recipe=Recipe(name="made"),
            provenance=provenance or {},
        )
        golden = {"input:x": np.zeros((1, 2), np.float32), "output:y": np.zeros((1, 3), np.float32)}
        return Artifact.seal(root, manifest, golden=golden)

    return make


@pytest.fixture
def make_report() -> Callable[[float], Report]:
    def make(accuracy: float) -> Report:
        measurement = Measurement(name="metric.accuracy", value=accuracy, direction="higher", n=100, low=0.1, high=0.9)
        return Report(subject="digits", measurements=(measurement,), notes=("ünïcode",))

    return make


@pytest.fixture(scope="session")
def apart() -> Iterator[Callable[..., tuple[int, list[Any]]]]:
    """`apart(registry, *calls, line=0, unprivileged=False)`: the wait status of a process of its own, killed at that
    line of registry code or without root's rights, and what each call returned or raised."""
    command = [sys.executable, str(Path(__file__).with_name("forker.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    asked, told = process.stdin, process.stdout
    assert asked is not None
    assert told is not None

    def ask(
        registry: Registry, *calls: Callable[[Registry], object], line: int = 0, unprivileged: bool = False
    ) -> tuple[int, list[Any]]:
        pickle.dump((registry.home.root, calls, line, unprivileged), asked)
        asked.flush()
        status, outcomes = pickle.load(told)
        return status, outcomes

    with process:
        yield ask
        asked.close()
