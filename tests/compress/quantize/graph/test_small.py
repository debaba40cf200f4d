"""Which layers are too small to round, and how a gate computed in float meets integers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fettle.compress.capture import capture, layer_of
from fettle.compress.quantize.graph.placement import ANCHORS, place
from fettle.compress.quantize.graph.small import small_layers
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.step import Context
from fettle.core.errors import UsageError

aten = torch.ops.aten


class Gated(nn.Module):
    """Two convolutions, the first with a squeeze-and-excitation gate, and a head."""

    def __init__(self, *, gate: int = 2):
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.squeeze, self.excite = nn.Conv2d(8, gate, 1), nn.Conv2d(gate, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.wide(x)
        means = nn.functional.adaptive_avg_pool2d(x, 1)
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(means))))
        return self.head(torch.relu(self.deep(x)).mean(dim=(2, 3)))


def built(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gated(**options).eval()


def captured(model, *, size=16, rows=2):
    return capture(model, (torch.ones(rows, 3, size, size),))


def anchors(graph):
    return [node for node in graph.graph.nodes if node.target in ANCHORS]


def names(found):
    return sorted(layer_of(node) for node in found)


def test_gates_and_heads_are_small():
    graph = captured(built())
    # By hand: 14² · 8 · 27 + 12² · 8 · 72 + 16 + 16 + 32 multiplications, of which a thousandth is 125.
    assert names(small_layers(anchors(graph), share=0.001)) == ["excite", "head", "squeeze"]
    assert names(small_layers(anchors(graph), share=31 / 125_344)) == ["excite", "squeeze"]
    assert small_layers(anchors(graph), share=0.0) == set()


def test_a_layer_of_many_positions_is_never_small():
    graph = captured(built())
    assert not {"wide", "deep"} & set(names(small_layers(anchors(graph), share=0.99)))


def test_small_layers_that_hold_much_of_the_file_are_not_small():
    # 8 · 64 weights twice, beside 216 + 576 + 32 others.
    assert small_layers(anchors(captured(built(gate=64))), share=0.01) == set()


def test_nothing_is_small_in_nothing():
    assert small_layers([], share=0.5) == set()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_rows_of_the_example_do_not_count(rows):
    assert names(small_layers(anchors(captured(built(), rows=rows)), share=0.001)) == ["excite", "head", "squeeze"]


def test_a_batch_folded_into_another_axis_counts_as_positions():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    graph = capture(nn.Sequential(layer, nn.Linear(16, 16)).eval(), (torch.ones(2, 6, 16),))
    # The projection after attention is called on (6 · rows, 16): a row uses it at six places.
    assert small_layers(anchors(graph), share=0.5) == set()


def test_the_product_with_a_gate_stays_in_integers():
    graph = captured(built())
    placement = place(graph, small_share=0.01)
    assert names(placement.anchors) == ["deep", "wide"]
    (product,) = (node for node in graph.graph.nodes if node.target == aten.mul.Tensor)
    gate = next(node for node in product.args if node.target == aten.sigmoid.default)
    assert product in placement.hard
    assert gate in placement.hard, "rounded as it comes from float"
    assert gate.args[0] not in placement.hard, "what it is computed from is not"
    assert all(gate.args[0] is not node for node in placement.soft)
    told = [sentence for sentence in placement.left_float if "at most 1 % of the work" in sentence]
    assert sorted(sentence.partition(":")[0] for sentence in told) == ["excite", "head", "squeeze"]


def test_a_factor_as_large_as_what_it_scales_is_no_gate():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.second(
                self.first(x) * torch.sigmoid(torch.erf(x.sum(dim=1, keepdim=True).expand(-1, 8, -1, -1)))
            )

    graph = captured(Two().eval())
    placement = place(graph)
    assert not any(node.target == aten.sigmoid.default for node in placement.hard)


def test_left_in_float_a_gate_costs_less_error():
    model, x = built(), torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    context = {"example": (x[:2],), "calibration": [(x,)]}

    def error(share):
        quantized = PostTraining(small_share=share).apply(model, Context(**context))
        with torch.no_grad():
            return float((quantized(x) - model(x)).square().mean())

    assert error(0.01) < error(0.0)


@pytest.mark.parametrize("share", [-0.1, 1.0, 3])
def test_a_share_is_a_share(share):
    with pytest.raises(UsageError, match="small_share must be 0 or more and less than 1"):
        PostTraining(small_share=share)
