from __future__ import annotations

import onnx
import pytest

from fettle.core.errors import CorruptArtifact, InvalidInput
from fettle.runtime.onnxruntime import OnnxRuntime
from fettle.testing.models import CASES
from fettle.testing.runtimes import named_data, seal


def test_the_file_names_inputs_outputs_and_a_free_batch(exported):
    folder, signature = exported(OnnxRuntime, "two_inputs")
    graph = onnx.load(folder / "model.onnx").graph
    assert [item.name for item in graph.input] == [spec.name for spec in signature.inputs]
    assert [item.name for item in graph.output] == [spec.name for spec in signature.outputs]
    assert all(item.type.tensor_type.shape.dim[0].dim_param for item in graph.input)


def test_one_file_holds_everything(exported):
    folder, _ = exported(OnnxRuntime, "residual")
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def test_a_runner_checks_what_it_is_called_with(onnx_mlp):
    folder, signature = onnx_mlp
    runner = OnnxRuntime().load(seal(folder, signature), threads=1)
    rows = named_data(CASES["mlp"], rows=3)["input_9"]
    assert runner(rows).shape == (3, 4)
    for bad in ((), (rows, rows), (rows[:, :5],), (rows.astype("float64"),)):
        with pytest.raises(InvalidInput):
            runner(*bad)


def test_a_missing_file_is_corrupt(onnx_mlp):
    folder, signature = onnx_mlp
    artifact = seal(folder, signature)
    (folder / "model.onnx").unlink()
    with pytest.raises(CorruptArtifact, match=r"model\.onnx"):
        OnnxRuntime().load(artifact, threads=1)


def test_a_file_whose_outputs_are_not_those_of_the_signature_is_refused(onnx_mlp):
    folder, signature = onnx_mlp
    model = onnx.load(folder / "model.onnx")
    model.graph.output[0].name = "other"
    for node in model.graph.node:
        node.output[:] = ["other" if name == "output_9" else name for name in node.output]
    onnx.save(model, folder / "model.onnx")
    artifact = seal(folder, signature)
    with pytest.raises(CorruptArtifact, match="output_9"):
        OnnxRuntime().load(artifact, threads=1)


def test_external_data_is_not_followed_out_of_the_folder(onnx_mlp, tmp_path):
    folder, signature = onnx_mlp
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4096)
    model = onnx.load(folder / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    onnx.external_data_helper.set_external_data(tensor, "../secret.bin", offset=0, length=len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CorruptArtifact):
        OnnxRuntime().load(seal(folder, signature), threads=1)
