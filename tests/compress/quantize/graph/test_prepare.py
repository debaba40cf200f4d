from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from fettle.compress.capture import capture, layer_of
from fettle.compress.quantize.graph.placement import place
from fettle.compress.quantize.graph.prepare import prepare
from fettle.testing.models import CASES
from fettle.testing.steps import answers, captured

aten = torch.ops.aten


class Product(nn.Module):
    """Applies a function of x and the parameters w (4, 3), square (4, 4), stack (2, 4, 3), b (3,) and rows (2, 3)."""

    def __init__(self, function):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in {"w": (4, 3), "square": (4, 4), "stack": (2, 4, 3), "b": (3,), "rows": (2, 3)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def prepared(model, *inputs):
    graph = capture(model.eval(), inputs)
    prepare(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def layers(graph):
    return [node for node in graph.graph.nodes if node.target == aten.linear.default]


LINEAR = {
    "product": lambda m, x: x @ m.w,
    "with bias": lambda m, x: x @ m.w + m.b,
    "bias first": lambda m, x: m.b + x @ m.w,
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w),
    "mm": lambda m, x: torch.mm(x, m.w),
    "transposed": lambda m, x: (x @ m.square.T) @ m.w,
    "sliced": lambda m, x: x @ m.square[:, 1:4],
    "computed": lambda m, x: functional.linear(x, (m.w * 2).T, m.b + 1),
    "taken twice": lambda m, x: torch.cat([x @ m.w, (x * 2) @ m.w]),
}
OTHER = {
    "of activations": lambda m, x: x @ x.T @ x,
    "constant first": lambda m, x: (m.w.T @ x[:, :, None])[..., 0],
    "stack": lambda m, x: x @ m.stack,
    "scaled addmm": lambda m, x: torch.addmm(m.b, x, m.w, beta=2, alpha=3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_constant_product_becomes_a_linear_layer_and_answers_as_before(name):
    model, x = Product(LINEAR[name]), torch.randn(5, 4)
    graph = prepared(model, x)
    assert torch.allclose(graph(x), model(x), atol=1e-5)
    assert layers(graph)
    targets = {node.target for node in graph.graph.nodes}
    assert not targets & {aten.matmul.default, aten.mm.default, aten.addmm.default, aten.add.Tensor}


@pytest.mark.parametrize("name", OTHER)
def test_other_products_stay_as_they_are(name):
    model, x = Product(OTHER[name]), torch.randn(5, 4)
    graph = prepared(model, x)
    assert torch.allclose(graph(x), model(x), atol=1e-5)
    assert not layers(graph)
    assert any("matrix product stays float" in sentence for sentence in place(graph).left_float)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x @ m.w + m.rows[0] * x.sum(),
        lambda m, x: (x @ m.w) + m.rows[:1],
        lambda m, x: torch.add(x @ m.w, m.b, alpha=2),
        lambda m, x: (y := x @ m.w) + m.b + y,
    ],
    ids=["computed", "matrix", "scaled", "read twice"],
)
def test_what_is_no_bias_is_not_taken_for_one(function):
    model, x = Product(function), torch.randn(5, 4)
    graph = prepared(model, x)
    assert torch.allclose(graph(x), model(x), atol=1e-5)
    assert [len(layer.args) for layer in layers(graph)] == [2]


@pytest.mark.parametrize(
    "make", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=["weight", "spectral"]
)
@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 1), nn.Conv2d(6, 4, 1, bias=False)])
def test_a_parametrized_layer_reads_a_constant_weight(make, layer):
    model = make(layer)
    x = torch.randn(3, 6, *[5] * (layer.weight.ndim - 2))
    graph = prepared(model, x)
    assert torch.allclose(graph(x), model.eval()(x), atol=1e-5)
    assert len(place(graph).anchors) == 1


def test_batch_norm_folds_into_a_layer_with_a_computed_weight():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    graph = prepared(model, torch.randn(2, 3, 5, 5))
    assert "_native_batch_norm_legit_no_training" not in str(graph.graph)


def test_cross_attention_has_three_projections_with_names():
    case = CASES["cross_attention"]
    graph = captured(case)
    prepare(graph)
    names = [layer_of(anchor) for anchor in place(graph).anchors]
    assert names.count("layer.multihead_attn.in_proj") == 2
    assert {"layer.multihead_attn.out_proj", "layer.self_attn.in_proj", "layer.self_attn.out_proj"} < set(names)
    for want, have in zip(answers(case.build(), case.data(rows=3)), answers(graph, case.data(rows=3)), strict=True):
        assert torch.allclose(want, have, atol=1e-5)


def test_a_product_with_a_parameter_goes_by_its_name():
    graph = prepared(Product(LINEAR["with bias"]), torch.randn(2, 4))
    assert [layer_of(layer) for layer in layers(graph)] == ["w"]


def test_layers_that_share_a_computed_weight_go_on_sharing_it():
    def twice(m, x):
        weight = m.square.T * 2
        return functional.linear(functional.relu(functional.linear(x, weight)), weight)

    graph = prepared(Product(twice), torch.randn(2, 4))
    first, second = layers(graph)
    assert first.args[1] is second.args[1]


def test_a_weight_that_would_grow_stays_computed():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Parameter(torch.randn(2, 32)), nn.Parameter(torch.randn(32, 2))

        def forward(self, x):
            return functional.linear(x, self.up @ self.down)

    graph = prepared(LowRank(), torch.randn(2, 32))
    (sentence,) = [s for s in place(graph).left_float if "linear" in s]
    assert "its weight is computed while the model runs" in sentence


def test_a_random_weight_is_drawn_anew_each_time():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return functional.linear(x, self.layer.weight + torch.randn_like(self.layer.weight))

    x = torch.randn(2, 4)
    graph = prepared(Noisy(), x)
    assert not torch.equal(graph(x), graph(x))
    assert not place(graph).anchors
