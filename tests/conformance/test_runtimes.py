"""Every runtime that is found keeps what fettle.testing.runtimes asks of it; and the kit catches those that do not."""

from __future__ import annotations

import numpy as np
import pytest

from fettle.core import plugins
from fettle.core.runner import Runner, RuntimeBase
from fettle.runtime.eager import Eager
from fettle.testing import runtimes

FOUND = plugins.installed("fettle.runtime", RuntimeBase)


@pytest.mark.parametrize("check", runtimes.CHECKS, ids=lambda check: check.__name__)
# Inductor compiles each model for some 5 s: tests/runtime/test_inductor.py runs the checks that compile few.
@pytest.mark.parametrize("name", sorted(name for name, cls in FOUND.items() if cls.by_default))
def test_every_runtime_conforms(name, check, tmp_path):
    check(FOUND[name](), tmp_path)


def test_the_runtimes_are_found_by_their_files():
    assert {"eager", "null", "onnxruntime"} <= set(FOUND)
    assert all("float" in cls.precisions for cls in FOUND.values())


class Bad(Eager):
    """A runtime with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.exports = 0

    def export(self, program, directory, signature):
        super().export(program, directory, signature)
        self.exports += 1
        if self.fault == "other bytes":
            (directory / "stamp.txt").write_text(str(self.exports))
        if self.fault == "source":
            (directory / "notes.txt").write_text("fettle.testing.models, line 3")
        if self.fault == "pickle":
            (directory / "weights.pt").write_bytes(b"PK\x03\x04 and so on")

    def load(self, artifact, *, threads):
        if self.fault == "trusting":
            return Altered(None, artifact.manifest.signature, self.fault)
        return Altered(super().load(artifact, threads=threads), artifact.manifest.signature, self.fault)


class Altered(Runner):
    def __init__(self, inner, signature, fault):
        super().__init__(signature)
        self.inner, self.fault = inner, fault
        self.buffers = {}

    def run(self, inputs):
        outputs = self.inner.run(inputs)
        if self.fault == "inaccurate":
            outputs = {name: array + 1e-3 for name, array in outputs.items()}
        if self.fault == "order":
            outputs = dict(reversed(outputs.items()))
        if self.fault == "double":
            outputs = {name: array.astype(np.float64) for name, array in outputs.items()}
        if self.fault == "one buffer":
            for name, array in outputs.items():
                buffer = self.buffers.setdefault(name, np.zeros((32, *array.shape[1:]), array.dtype))
                buffer[: len(array)] = array
                outputs[name] = buffer[: len(array)]
        if self.fault == "strides":
            strides = next(iter(inputs.values()))
            outputs = {name: array + (not strides.flags.c_contiguous) for name, array in outputs.items()}
        return outputs


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("inaccurate", runtimes.agrees_with_torch),
        ("order", runtimes.agrees_with_torch),
        ("double", runtimes.agrees_with_torch),
        ("one buffer", runtimes.answers_several_threads),
        ("strides", runtimes.takes_views),
        ("other bytes", runtimes.writes_the_same_twice),
        ("source", runtimes.writes_no_source),
        ("pickle", runtimes.writes_no_pickle),
        ("trusting", runtimes.refuses_foreign_files),
    ],
)
def test_the_kit_catches_a_bad_runtime(fault, check, tmp_path):
    with pytest.raises(AssertionError):
        check(Bad(fault), tmp_path)
