"""Compiled where it is loaded, from the eager runtime's files; without a compiler an error says so."""

from __future__ import annotations

import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from fettle.compress.capture import export_program
from fettle.core.errors import CorruptArtifact, ForeignArtifact, MissingExtra
from fettle.core.signature import Signature, TensorSpec
from fettle.runtime import inductor
from fettle.runtime._operations import LINEAR_DYNAMIC
from fettle.runtime.eager import Eager, read_program
from fettle.runtime.inductor import Inductor, require_compiler
from fettle.testing import runtimes
from fettle.testing.models import CASES
from fettle.testing.runtimes import build, export_case, named_data, seal
from fettle.testing.steps import answers

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, inductor._COMPILERS)), reason="needs a C++ compiler: apt-get install g++"
)
slow = pytest.mark.slow


@slow
@needs_compiler
@pytest.mark.parametrize(("name", "precision"), [("residual", "float"), ("norm_first", "bf16")])
def test_it_answers_as_torch_does(name, precision, tmp_path):
    case = CASES[name]
    model = build(case, precision)
    signature = export_case(Inductor(), case, tmp_path / "model", model=model)
    runner = Inductor().load(seal(tmp_path / "model", signature, precision=precision), threads=1)
    for rows in (1, 2, 7, 1):
        found = runner.run(named_data(case, rows=rows, seed=rows))
        for spec, want in zip(signature.outputs, answers(model, case.data(rows=rows, seed=rows)), strict=True):
            # In 16 bits the compiler keeps in float32 what torch rounds between two operations.
            np.testing.assert_allclose(found[spec.name], want.numpy(), atol=1e-5 if precision == "float" else 0.05)
            assert found[spec.name].dtype == np.float32


@slow
@needs_compiler
@pytest.mark.parametrize("check", [runtimes.answers_several_threads, runtimes.takes_views], ids=lambda c: c.__name__)
def test_it_conforms_where_each_check_compiles_little(check, tmp_path):
    check(Inductor(), tmp_path)


def test_it_writes_what_eager_writes_and_no_library(exported):
    folder, _ = exported(Inductor, "mlp")
    eager, _ = exported(Eager, "mlp")
    assert sorted(path.name for path in folder.iterdir()) == ["graph.json", "weights.safetensors"]
    for path in folder.iterdir():
        assert path.read_bytes() == (eager / path.name).read_bytes()


def never(*arguments):
    raise AssertionError("must not be compiled")


def test_a_foreign_graph_stops_at_the_wall(exported, monkeypatch):
    folder, signature = exported(Inductor, "mlp")
    text = (folder / "graph.json").read_text()
    (folder / "graph.json").write_text(text.replace("torch.ops.aten.linear.default", "torch.os.system"))
    monkeypatch.setattr(inductor, "require_compiler", lambda: "c++")
    monkeypatch.setattr(inductor, "_compile", never)
    with pytest.raises(ForeignArtifact, match="ATen operations"):
        Inductor().load(seal(folder, signature), threads=1)


def test_a_missing_file_is_corrupt(exported, monkeypatch):
    folder, signature = exported(Inductor, "mlp")
    artifact = seal(folder, signature)
    (folder / "weights.safetensors").unlink()
    monkeypatch.setattr(inductor, "require_compiler", lambda: "c++")
    monkeypatch.setattr(inductor, "_compile", never)
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        Inductor().load(artifact, threads=1)


def test_a_compiler_that_fails_is_told(exported, monkeypatch):
    def fails(program, path):
        raise RuntimeError("C++ compile error\nand a page more")

    folder, signature = exported(Inductor, "mlp")
    monkeypatch.setattr(inductor, "require_compiler", lambda: "c++")
    monkeypatch.setattr(inductor, "_compile", fails)
    with pytest.raises(CorruptArtifact, match=r"cannot compile the graph: RuntimeError: C\+\+ compile error$"):
        Inductor().load(seal(folder, signature), threads=1)


def test_without_a_compiler_it_says_what_to_install(exported, monkeypatch):
    folder, signature = exported(Inductor, "mlp")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
    with pytest.raises(MissingExtra, match=r"found none of g\+\+, clang\+\+, c\+\+: apt-get install g\+\+"):
        Inductor().load(seal(folder, signature), threads=1)


def test_a_compiler_named_by_the_user_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(MissingExtra, match=r"CXX names .*none, which is not there"):
        require_compiler()


def test_it_is_not_tried_unasked():
    assert not Inductor.by_default
    assert Inductor().precisions >= Eager().precisions


@pytest.mark.parametrize(("device", "machine"), [("cuda", "x86_64"), ("cpu", "aarch64")])
def test_integers_are_offered_only_where_they_are_multiplied(device, machine, monkeypatch):
    monkeypatch.setenv("FETTLE_DEVICE", device)
    monkeypatch.setattr(inductor.platform, "machine", lambda: machine)
    assert "int8-dynamic" not in inductor.machine_precisions()


class Layer(nn.Module):
    """One dynamic layer, 64 to 48."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) / 8
        scales = weight.abs().amax(1) / 63  # 7 bits: no pair of products leaves 16
        self.register_buffer("weight", torch.round(weight / scales[:, None]).to(torch.int8).t().contiguous())
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 48))

    def forward(self, x):
        return LINEAR_DYNAMIC(x, self.weight, self.scales, self.bias)


def export_layer(folder):
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 5, 64))
    signature = Signature(inputs=(spec,), outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 5, 48)),))
    model = Layer()
    folder.mkdir()
    Inductor().export(export_program(model, (torch.randn(2, 5, 64),)), folder, signature)
    return model, seal(folder, signature, precision="int8-dynamic")


def test_the_file_of_a_dynamic_layer_holds_integers_and_passes_the_wall(tmp_path):
    _, artifact = export_layer(tmp_path / "model")
    stored = safetensors.numpy.load_file(artifact.root / "weights.safetensors")
    assert {value.dtype.name for value in stored.values() if value.size == 48 * 64} == {"int8"}
    assert "fettle" not in str(read_program(artifact).graph)


@slow
@needs_compiler
@pytest.mark.skipif("int8-dynamic" not in inductor.machine_precisions(), reason="needs oneDNN on an x86 CPU")
def test_a_dynamic_layer_multiplies_integers(tmp_path, monkeypatch):
    seen = []

    def spy(program, path):
        compiled = compile_program(program, path)
        with zipfile.ZipFile(path) as package:
            seen.extend(package.read(name) for name in package.namelist() if name.endswith(".cpp"))
        return compiled

    compile_program = inductor._compile
    monkeypatch.setattr(inductor, "_compile", spy)
    model, artifact = export_layer(tmp_path / "model")
    runner = Inductor().load(artifact, threads=1)
    assert any(b"qlinear_pointwise" in text for text in seen)
    for rows in (1, 3, 32):
        x = torch.randn(rows, 5, 64, generator=torch.Generator().manual_seed(rows))
        want, found = model(x).detach(), torch.from_numpy(runner(x.numpy()))
        # The sums are exact; a value half-way between two steps may be rounded the other way.
        assert float((found - want).square().mean().sqrt()) < 0.002 * float(want.std())
