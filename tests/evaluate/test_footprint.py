"""Sizes of real files, and the peak of a real allocation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fettle.core.artifact import Artifact, Manifest
from fettle.core.errors import UsageError
from fettle.core.recipe import Recipe
from fettle.core.signature import Signature, TensorSpec
from fettle.evaluate.footprint import measure_peak_memory, measure_size, size_on_disk


def test_size_on_disk(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "deep" / "b").write_bytes(b"x" * 20)
    (tmp_path / "deep" / "er" / "c").write_bytes(b"x" * 30)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert size_on_disk(tmp_path) == 60
    assert size_on_disk(tmp_path / "deep" / "b") == 20
    (tmp_path / "empty").mkdir()
    assert size_on_disk(tmp_path / "empty") == 0


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        size_on_disk(tmp_path / "absent")


def test_size_of_an_artifact_leaves_golden_tensors_out(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x" * 1234)
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
    signature = Signature(inputs=(spec,), outputs=(spec,))
    manifest = Manifest(
        runtime="onnxruntime", precision="float", signature=signature, files=(), recipe=Recipe(name="float")
    )
    golden = {"input:x": np.zeros((500, 2), np.float32), "output:x": np.zeros((500, 2), np.float32)}
    measured = measure_size(Artifact.seal(tmp_path, manifest, golden=golden))
    assert (measured.name, measured.value, measured.unit, measured.direction) == ("size", 1234.0, "bytes", "lower")


def test_peak_memory_sees_what_a_call_holds() -> None:
    small = measure_peak_memory(lambda: None)
    if small is None:
        pytest.skip("the kernel does not let this process reset its peak")
    large = measure_peak_memory(lambda: np.ones(100 * 2**20, np.uint8))
    assert large is not None
    assert large.value > 90 * 2**20 > small.value
