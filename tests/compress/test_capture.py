from __future__ import annotations

import functools
import warnings

import pytest
import torch

from fettle.compress.capture import capture, check_layer_names, export_program, is_named, layer_of, two_rows
from fettle.core.errors import CaptureError, DataError, UsageError
from fettle.testing.models import CASES, BranchOnValue, FixedBatch
from fettle.testing.steps import answers

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@functools.cache
def graph_of(case):
    return capture(case.build(), case.data(rows=1))


@every
def test_the_graph_answers_as_the_model_at_any_batch_size(case):
    model, graph = case.build(), graph_of(case)
    for rows in (1, 3):
        for want, have in zip(answers(model, case.data(rows=rows)), answers(graph, case.data(rows=rows)), strict=True):
            torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)


@every
def test_no_in_place_operation_is_left(case):
    for node in graph_of(case).graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node.target


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept_and_evaluation_captured(training):
    case = CASES["dropout"]
    model = case.build().train(training)
    graph = capture(model, case.data(rows=2))
    assert all(module.training is training for module in model.modules())
    data = case.data(rows=4)
    torch.testing.assert_close(answers(graph, data)[0], answers(model.eval(), data)[0])


def test_mixed_training_flags_are_kept():
    case = CASES["dropout"]
    model = case.build()
    model[1].train()
    flags = [module.training for module in model.modules()]
    capture(model, case.data(rows=2))
    assert [module.training for module in model.modules()] == flags


def test_the_fast_path_setting_and_the_flags_survive_a_failure():
    before = torch.backends.mha.get_fastpath_enabled()
    model = FixedBatch().train()
    with pytest.raises(CaptureError):
        capture(model, (torch.ones(2, 8),))
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("model", [FixedBatch(), BranchOnValue()], ids=lambda model: type(model).__name__)
def test_what_cannot_be_captured_is_named_with_the_usual_causes(model):
    with pytest.raises(CaptureError, match=type(model).__name__) as caught:
        capture(model, (torch.ones(2, 8),))
    assert "usual causes" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), "non-empty tuple"),
        (torch.ones(2, 3), "non-empty tuple of tensors, got Tensor"),
        ([torch.ones(2, 3)], "got list"),
        ((1.0,), "example input 0 must be a tensor"),
        ((torch.ones(2, 3), "x"), "example input 1 must be a tensor"),
        ((torch.tensor(1.0),), r"got shape \[\]"),
        ((torch.ones(0, 3),), r"got shape \[0, 3\]"),
        ((torch.ones(2, 3), torch.ones(3, 3)), "share dimension 0"),
    ],
)
def test_a_bad_example_is_refused(example, message):
    with pytest.raises(DataError, match=message):
        capture(torch.nn.Linear(3, 2), example)


def test_one_row_is_doubled_and_more_are_kept():
    one, two = (torch.ones(1, 3),), (torch.ones(2, 3),)
    assert two_rows(one)[0].shape == (2, 3)
    assert two_rows(two) is two


class Varargs(torch.nn.Module):
    def forward(self, *inputs):
        return inputs[0] + inputs[1]


def test_a_forward_of_any_number_of_inputs_is_captured():
    graph = capture(Varargs(), (torch.ones(2, 3), torch.ones(2, 3)))
    assert graph(torch.ones(5, 3), torch.ones(5, 3)).shape == (5, 3)


def test_layers_are_named():
    graph = graph_of(CASES["residual"])
    names = {layer_of(node) for node in graph.graph.nodes if node.target == torch.ops.aten.conv2d.default}
    assert names == {"stem", "conv1", "conv2"}


def test_torch_warnings_stay_inside():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = export_program(CASES["norm_first"].build(), CASES["norm_first"].data(rows=2))
    assert program.graph_signature.user_outputs


def test_names_of_layers_are_checked():
    graph = graph_of(CASES["mlp"])
    layers = [node for node in graph.graph.nodes if node.target == torch.ops.aten.linear.default]
    check_layer_names(layers, ("0", "4"))
    with pytest.raises(UsageError, match="keep_float must be a tuple of names, got the string '0'"):
        check_layer_names(layers, "0")
    for wrong in ("nine", "1"):  # 1 is a ReLU, which keep_float cannot keep
        with pytest.raises(UsageError, match=f"nothing that would be quantized: '{wrong}'. Layers: 0, 2, 4"):
            check_layer_names(layers, (wrong,))


def test_the_name_of_a_module_stands_for_the_layers_in_it():
    graph = graph_of(CASES["norm_first"])
    layers = [node for node in graph.graph.nodes if node.target == torch.ops.aten.linear.default]
    named = [layer_of(node) for node in layers if is_named(node, ("layer.self_attn", "head"))]
    assert named == ["layer.self_attn.in_proj", "layer.self_attn.out_proj", "head"]
    assert not any(is_named(node, ("layer.self",)) for node in layers)
    check_layer_names(layers, ("layer.self_attn",))
