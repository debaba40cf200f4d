from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional

from fettle.compress.capture import capture, layer_of
from fettle.compress.quantize.graph.placement import ANCHORS, MOVERS, fused, place
from fettle.compress.quantize.graph.prepare import prepare
from fettle.testing.models import CASES
from fettle.testing.steps import captured

aten = torch.ops.aten
ATTENTION = ("norm_first", "norm_last", "cross_attention")
CONVOLUTIONAL = [
    name for name in CASES if name not in (*ATTENTION, "mlp", "tied_weights", "two_inputs", "parametrized")
]


def placed(model, *inputs, keep_float=()):
    graph = capture(model.eval(), inputs)
    prepare(graph)
    return graph, place(graph, keep_float=keep_float)


def placed_anew(name, **options):
    case = CASES[name]
    return placed(case.build(), *case.data(rows=2), **options)


@cache
def placed_case(name):
    """The tests only read it."""
    graph = captured(CASES[name])
    prepare(graph)
    return graph, place(graph, keep_float=())


def nodes(graph, *targets):
    return [node for node in graph.graph.nodes if node.target in targets]


def is_quantized(placement, node, reader):
    return node in placement.hard or reader in placement.soft.get(node, ())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_anchor_is_found_and_reads_integers(case):
    _, placement = placed_case(case.name)
    assert len(placement.anchors) == case.anchors
    for anchor in placement.anchors:
        assert is_quantized(placement, anchor.args[0], anchor), anchor


@pytest.mark.parametrize("name", CASES)
def test_the_placement_is_consistent(name):
    _, placement = placed_case(name)
    assert not set(placement.hard) & set(placement.soft)
    for mover, source in placement.shared.items():
        assert mover.target in MOVERS
        assert mover in placement.hard or mover in placement.soft
        assert source in placement.observed, "parameters are shared with a tensor that has its own"
    assert not set(placement.observed) & set(placement.shared)


@pytest.mark.parametrize("name", CASES)
def test_two_captures_are_placed_alike(name):
    def names(placement):
        soft = {node.name: [reader.name for reader in readers] for node, readers in placement.soft.items()}
        return [node.name for node in placement.hard], soft, [node.name for node in placement.observed]

    assert names(placed_case(name)[1]) == names(placed_anew(name)[1])


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_convolution_writes_integers_after_its_clip(name):
    _, placement = placed_case(name)
    for anchor in placement.anchors:
        if anchor.target != aten.linear.default:
            assert fused(anchor) in placement.hard, anchor
            assert fused(anchor) is anchor or anchor not in placement.hard, "nothing is rounded before the clip"


def test_blocks_that_share_one_relu_are_each_quantized_after_it():
    graph, placement = placed_case("shared_relu")
    relus = nodes(graph, aten.relu.default)
    assert len(relus) == 2
    assert set(relus) <= set(placement.hard)


@pytest.mark.parametrize("name", ["residual", "pad_shortcut"])
def test_a_residual_addition_runs_in_integers(name):
    graph, placement = placed_case(name)
    addition = next(n for n in nodes(graph, aten.add.Tensor, aten.add_.Tensor))
    for operand in addition.args[:2]:
        assert is_quantized(placement, operand, addition), operand
    assert fused(addition) in placement.hard


def test_the_pad_of_a_shortcut_shares_the_parameters_of_its_source():
    graph, placement = placed_case("pad_shortcut")
    (pad,) = nodes(graph, aten.pad.default)
    source = placement.shared[pad]
    assert source.target == aten.relu.default
    assert source in placement.hard
    assert all(placement.shared[node] is source for node in nodes(graph, aten.slice.Tensor) if node in placement.soft)


class Padded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second, self.options = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), options

    def forward(self, x):
        return self.second(functional.pad(self.first(x), (1, 1, 1, 1), **self.options)).mean()


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, True),
        ({"value": 0.0}, True),
        ({"value": 3.0}, False),
        ({"mode": "reflect"}, True),
        ({"mode": "replicate"}, True),
    ],
    ids=str,
)
def test_a_pad_with_another_constant_has_its_own_range(options, shares):
    graph, placement = placed(Padded(**options), torch.ones(2, 3, 6, 6))
    (pad,) = nodes(graph, aten.pad.default)
    assert (pad in placement.shared) is shares
    assert is_quantized(placement, pad, placement.anchors[1])


def test_concatenation_runs_in_integers_between_convolutions():
    graph, placement = placed_case("concatenation")
    (cat,) = nodes(graph, aten.cat.default)
    assert cat in placement.hard
    assert all(is_quantized(placement, operand, cat) for operand in cat.args[0])


def test_the_gate_of_squeeze_excite_runs_in_integers():
    graph, placement = placed_case("squeeze_excite")
    (sigmoid,), (product,) = nodes(graph, aten.sigmoid.default), nodes(graph, aten.mul.Tensor)
    assert sigmoid in placement.hard
    assert product in placement.hard


@pytest.mark.parametrize("name", ["norm_first", "norm_last"])
def test_a_transformer_keeps_its_residuals_norms_and_attention_float(name):
    graph, placement = placed_case(name)
    text = "\n".join(placement.left_float)
    for layer in ("layer.norm1", "layer.norm2", "layer.self_attn"):
        assert layer in text
    assert "layer norm" in text
    assert "attention" in text
    for node in nodes(graph, aten.add.Tensor, aten.layer_norm.default, aten.scaled_dot_product_attention.default):
        assert node not in placement.hard, "residuals stay float"


@pytest.mark.parametrize(("name", "sentence"), [("gelu", "GELU"), ("norm_at_start", "batch-norm")])
def test_what_stays_float_is_named_with_its_reason(name, sentence):
    _, placement = placed_case(name)
    assert sentence in "\n".join(placement.left_float)


def test_what_runs_in_integers_is_not_named():
    assert placed_case("residual")[1].left_float == ()


def test_a_layer_is_kept_float_on_request():
    graph, placement = placed_anew("residual", keep_float=("conv1",))
    assert "conv1" not in {layer_of(anchor) for anchor in placement.anchors}
    assert any("conv1" in sentence and "on request" in sentence for sentence in placement.left_float)
    kept = next(n for n in nodes(graph, *ANCHORS) if layer_of(n) == "conv1")
    assert fused(kept) not in placement.hard


def test_only_the_output_of_the_last_layer_stays_float():
    for name in ("mlp", "two_outputs"):
        graph, placement = placed_case(name)
        (output,) = [node for node in graph.graph.nodes if node.op == "output"]
        for result in output.args[0]:
            assert result not in placement.hard
            assert result not in placement.soft


def test_a_model_without_layers_has_nothing_to_place():
    _, placement = placed(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.ones(2, 3, 4))
    assert placement.anchors == []
    assert not placement.hard
    assert not placement.soft


def test_double_precision_stays_float_with_its_reason():
    model = nn.Linear(3, 2).double()
    _, placement = placed(model, torch.ones(2, 3, dtype=torch.float64))
    assert placement.anchors == []
    assert "float64" in placement.left_float[0]
