"""Folders with exported models, made once for all tests of this room."""

from __future__ import annotations

import shutil

import pytest

from fettle.runtime.eager import Eager
from fettle.runtime.onnxruntime import OnnxRuntime
from fettle.testing.models import CASES
from fettle.testing.runtimes import export_case


@pytest.fixture(scope="session")
def _masters(tmp_path_factory):
    held = {}

    def master(runtime, case):
        key = runtime.__name__, case
        if key not in held:
            folder = tmp_path_factory.mktemp("export") / "model"
            held[key] = folder, export_case(runtime(), CASES[case], folder)
        return held[key]

    return master


@pytest.fixture
def exported(_masters, tmp_path):
    """A function (runtime class, case name) -> (folder of its own, signature)."""

    def copy(runtime, case):
        folder, signature = _masters(runtime, case)
        own = tmp_path / f"{runtime.__name__}-{case}"
        shutil.copytree(folder, own)
        return own, signature

    return copy


@pytest.fixture
def eager_mlp(exported):
    return exported(Eager, "mlp")


@pytest.fixture
def onnx_mlp(exported):
    return exported(OnnxRuntime, "mlp")
