"""The gate: an engine that computes something else than was simulated is stopped, and the layer is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fettle.compress.capture import export_program
from fettle.compress.quantize.post_training import PostTraining
from fettle.core.artifact import Artifact, Manifest
from fettle.core.errors import ExportError
from fettle.core.recipe import Recipe
from fettle.runtime.eager import Eager
from fettle.runtime.onnxruntime import OnnxRuntime
from fettle.runtime.openvino import OpenVino
from fettle.stages.numerics import Deployed, check_numerics
from fettle.stages.task import signature_of
from fettle.testing.models import CASES
from fettle.testing.steps import context_for


class Wrong(OnnxRuntime):
    """Multiplies the weights of one layer by two on the way into the file."""

    factor = 2.0

    def __init__(self, victim):
        self.victim = victim

    def export(self, program, directory, signature):
        for name, value in program.state_dict.items():
            if self.victim in name and value.is_floating_point():  # not in place: the model holds the same tensor
                program.state_dict[name] = (
                    nn.Parameter(self.factor * value.detach()) if name in parameters(program) else self.factor * value
                )
        super().export(program, directory, signature)


class Slightly(Wrong):
    """Off by a seventh."""

    factor = 1.15


def parameters(program):
    return program.graph_signature.parameters


def deploy(runtime, model, case, folder, precision):
    example = case.data(rows=2)
    program = export_program(model, example)
    signature = signature_of(program)
    runtime.export(program, folder, signature)
    manifest = Manifest(
        runtime="onnxruntime", precision=precision, signature=signature, files=(), recipe=Recipe(name="x")
    )
    runner = runtime.load(Artifact(digest="", manifest=manifest, root=folder), threads=1)
    inputs = {
        spec.name: tensor.numpy() for spec, tensor in zip(signature.inputs, case.data(rows=32, seed=3), strict=True)
    }
    deployed = Deployed(
        runtime=runtime, precision=precision, model=model, original=case.build(), example=example, threads=1
    )
    return deployed, runner, inputs


@pytest.mark.parametrize("name", ["residual", "two_inputs", "norm_first"])
@pytest.mark.parametrize("runtime", [Eager(), OnnxRuntime(), OpenVino()], ids=lambda r: type(r).__name__)
def test_float_in_an_honest_engine_passes(runtime, name, tmp_path):
    case = CASES[name]
    found = check_numerics(*deploy(runtime, case.build(), case, tmp_path, "float"))
    assert found.name == "numerics.sqnr"
    assert found.value > 60
    assert found.n == 32


@pytest.mark.parametrize("runtime", [OnnxRuntime(), OpenVino()], ids=lambda r: type(r).__name__)
def test_int8_in_an_honest_engine_passes(runtime, tmp_path):
    case = CASES["residual"]
    model = PostTraining().apply(case.build(), context_for(case))
    assert check_numerics(*deploy(runtime, model, case, tmp_path, "int8")).value > 20


@pytest.mark.parametrize(("victim", "layer"), [("conv1", "conv1"), ("conv2", "conv2"), ("head.linear", "head.linear")])
def test_a_wrong_engine_is_stopped_at_the_layer(victim, layer, tmp_path):
    case = CASES["residual"]
    parts = deploy(Wrong(victim), case.build(), case, tmp_path, "float")
    with pytest.raises(ExportError, match=rf"to 60 dB in float, got .* dB on 32 validation rows; .* starts at {layer}"):
        check_numerics(*parts)


def test_a_wrong_integer_engine_is_stopped_at_the_layer(tmp_path):
    case = CASES["residual"]
    model = PostTraining().apply(case.build(), context_for(case))
    victim = [name for name in model.lowered().state_dict() if name.endswith("weight_int8_scale")][1]
    parts = deploy(Wrong(victim), model, case, tmp_path, "int8")
    with pytest.raises(ExportError, match=r"to 20 dB in int8, .* starts at conv1"):
        check_numerics(*parts)


def test_a_difference_below_the_noise_of_quantization_is_let_pass(tmp_path):
    case = CASES["residual"]
    model = PostTraining(weight_bits=2, small_share=0.0).apply(case.build(), context_for(case))
    victim = [name for name in model.lowered().state_dict() if name.endswith("weight_int8_scale")][-1]
    deployed, runner, inputs = deploy(Slightly(victim), model, case, tmp_path, "int8")
    assert check_numerics(deployed, runner, inputs).value < 20


def test_an_answer_that_is_not_finite_is_a_difference(tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            return x / x.abs().mean()

    case = CASES["mlp"]
    deployed, runner, inputs = deploy(OnnxRuntime(), Broken(), case, tmp_path, "float")
    zeros = {name: np.zeros_like(array) for name, array in inputs.items()}
    with pytest.raises(ExportError, match="-inf dB"):
        check_numerics(deployed, runner, zeros)


def test_the_model_is_left_as_it_was(tmp_path):
    case = CASES["residual"]
    model = case.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_numerics(*deploy(OnnxRuntime(), model, case, tmp_path, "float"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
