"""The reference runtime: what it writes comes back, and a graph from elsewhere reaches nothing but operations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from fettle.core.errors import ArtifactError, CorruptArtifact, ForeignArtifact
from fettle.runtime.eager import Eager, refuse_foreign, without_notes
from fettle.testing.models import CASES
from fettle.testing.runtimes import build, export_case, named_data, seal
from fettle.testing.steps import answers


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_model_comes_back_exactly(case, exported):
    folder, signature = exported(Eager, case.name)
    runner = Eager().load(seal(folder, signature), threads=1)
    for rows in (1, 3):
        expected = answers(case.build(), case.data(rows=rows))
        found = runner.run(named_data(case, rows=rows))
        for spec, want in zip(signature.outputs, expected, strict=True):
            np.testing.assert_allclose(found[spec.name], want.numpy(), atol=1e-5)


def test_what_is_written_holds_no_path_and_no_source(eager_mlp):
    text = (eager_mlp[0] / "graph.json").read_text()
    for private in (".py", "/work", "stack_trace", "graph_id", "File "):
        assert private not in text
    assert set(safetensors.numpy.load_file(eager_mlp[0] / "weights.safetensors"))


def change(folder, edit):
    path = folder / "graph.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def first_node(data):
    return data["graph_module"]["graph"]["nodes"][0]


TARGETS = [
    "torch.os.system",
    "torch.hub.load",
    "torch.load",
    "torch.utils.cpp_extension.load",
    "torch.ops.load_library",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.save.default",
    "torch.ops.aten.add",
    "torch.ops.aten.add.overloads",
    "torch.ops.aten.add.Tensor.__globals__",
    "torch.ops.aten.__init__.__globals__",
    "torch.ops.aten.__getattr__.__func__",
    "torch.ops.aten.add.Tensor\n.x",
    "torch.ops.aten.no_such_operation.default",
    "torch.ops.higher_order.cond",
    "torch.ops.fettle.anything.default",
    "_operator.methodcaller",
    "_operator.attrgetter",
    "operator.add",
    "math.sys",
    "#extension:thing",
    "builtins.eval",
    "os.system",
    "",
]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_that_is_no_operation_is_refused(target, eager_mlp):
    folder, signature = eager_mlp
    change(folder, lambda data: first_node(data).update(target=target))
    with pytest.raises(ForeignArtifact, match="ATen operations"):
        Eager().load(seal(folder, signature), threads=1)


EXPRESSIONS = [
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "s0.__class__",
    "lambda: 0",
    "exec('import os')",
    "open('/etc/passwd')",
    "9**9**9**9",
    "Pow(9, Pow(9, Pow(9, 9)))",
    "factorial(99999999)",
    "Symbol('s0'); import os",
    "Symbol('__import__')",
    "s0 if 1 else 2",
    "[1]",
    "1+" * 600 + "1",
    "s0\nimport os",
]


@pytest.mark.parametrize("text", EXPRESSIONS, ids=lambda text: text[:30])
def test_a_size_that_is_no_arithmetic_is_refused(text, eager_mlp):
    folder, signature = eager_mlp

    def put(data):
        found = [sizes for sizes in walk(data) if "expr_str" in sizes]
        assert found, "the example has a free size"
        for sizes in found:
            sizes["expr_str"] = text

    change(folder, put)
    with pytest.raises(ForeignArtifact, match="arithmetic on free sizes"):
        Eager().load(seal(folder, signature), threads=1)


def walk(data):
    if isinstance(data, dict):
        yield data
        for value in data.values():
            yield from walk(value)
    elif isinstance(data, list):
        for value in data:
            yield from walk(value)


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s77', positive=True, integer=True))",
        "4*s0 + 1",
        "u0//2",
    ],
)
def test_arithmetic_on_sizes_is_taken(text):
    refuse_foreign({"expr_str": text})


def container(kind, context="null", children=()):
    return {"type": kind, "context": context, "children_spec": list(children)}


@pytest.mark.parametrize(
    "spec",
    [
        json.dumps([1, container("collections.defaultdict", "{}")]),
        json.dumps([1, container("builtins.tuple", '{"__enum__": true, "fqn": "os:x"}')]),
        json.dumps([1, container("builtins.dict", '[{"__enum__": true}]')]),
        json.dumps([1, container("collections.namedtuple", '"a"')]),
        json.dumps([1, container("builtins.tuple", children=[container("os.x")])]),
        "[1]",
        "null",
        "not json",
        "[" * 100_000,
    ],
    ids=range(9),
)
def test_a_container_that_is_not_built_in_is_refused(spec):
    with pytest.raises(ForeignArtifact, match="tuples, lists and dicts"):
        refuse_foreign({"signature": {"in_spec": spec}})


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.update(guards_code=["__import__('os').system('true')"]),
        lambda data: first_node(data).update(metadata={"source_fn_stack": "x,torch.os.system"}),
    ],
)
def test_notes_and_guards_are_refused(edit, eager_mlp):
    folder, signature = eager_mlp
    change(folder, edit)
    with pytest.raises(ForeignArtifact, match="no guards and no notes"):
        Eager().load(seal(folder, signature), threads=1)


def test_a_tensor_may_be_called_like_a_key():
    tensors = {"target": {"dtype": 7}, "metadata": {"dtype": 7}, "expr_str": {"dtype": 7}, "guards_code": {"dtype": 7}}
    refuse_foreign({"tensor_values": tensors})
    assert without_notes(tensors) == tensors


class OddNames(torch.nn.Module):
    def forward(self, target, metadata):
        return target + metadata


def test_a_model_whose_inputs_are_called_like_keys_comes_back(tmp_path):
    from fettle.compress.capture import export_program
    from fettle.core.signature import Signature, TensorSpec

    names = [TensorSpec(name=name, dtype="float32", shape=("batch", 3)) for name in ("a", "b", "c")]
    signature = Signature(inputs=tuple(names[:2]), outputs=(names[2],))
    Eager().export(export_program(OddNames(), (torch.ones(2, 3), torch.ones(2, 3))), tmp_path, signature)
    runner = Eager().load(seal(tmp_path, signature), threads=1)
    ones = np.ones((4, 3), np.float32)
    assert (runner.run({"a": ones, "b": ones})["c"] == 2).all()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b'{"graph_module": 3}', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000],
    ids=range(9),
)
def test_a_graph_that_is_no_graph_is_refused(content, eager_mlp):
    folder, signature = eager_mlp
    (folder / "graph.json").write_bytes(content)
    with pytest.raises(ArtifactError):
        Eager().load(seal(folder, signature), threads=1)


@pytest.mark.parametrize("what", ["missing", "renamed", "other shape"])
def test_weights_that_do_not_fit_the_graph_are_refused(what, eager_mlp):
    folder, signature = eager_mlp
    path = folder / "weights.safetensors"
    tensors = safetensors.numpy.load_file(path)
    key = next(key for key in sorted(tensors) if key.endswith("weight"))
    value = tensors.pop(key)
    if what == "renamed":
        tensors["parameter:other"] = value
    if what == "other shape":
        tensors[key] = np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file(tensors, path)
    artifact = seal(folder, signature)
    with pytest.raises(CorruptArtifact):
        Eager().load(artifact, threads=1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["residual", "norm_first"])
def test_sixteen_bits_come_back_exactly(name, precision, tmp_path):
    case = CASES[name]
    model = build(case, precision)
    signature = export_case(Eager(), case, tmp_path / "model", model=model)
    stored = (tmp_path / "model" / "weights.safetensors").stat().st_size
    export_case(Eager(), case, tmp_path / "float")
    assert stored < 0.75 * (tmp_path / "float" / "weights.safetensors").stat().st_size
    runner = Eager().load(seal(tmp_path / "model", signature, precision=precision), threads=1)
    found = runner.run(named_data(case, rows=3))
    for spec, want in zip(signature.outputs, answers(model, case.data(rows=3)), strict=True):
        assert np.array_equal(found[spec.name], want.numpy())
