from __future__ import annotations

import pytest
import torch
from torch import nn

from fettle.compress.capture import capture
from fettle.compress.quantize.graph.fold import fold_batch_norm
from fettle.testing.models import CASES
from fettle.testing.steps import answers, captured

LAYERS = {
    "conv1d": (lambda **k: nn.Conv1d(4, 6, 3, **k), nn.BatchNorm1d, (4, 9)),
    "conv2d": (lambda **k: nn.Conv2d(4, 6, 3, **k), nn.BatchNorm2d, (4, 6, 6)),
    "strided": (lambda **k: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, **k), nn.BatchNorm2d, (4, 9, 9)),
    "grouped": (lambda **k: nn.Conv2d(4, 6, 3, groups=2, **k), nn.BatchNorm2d, (4, 6, 6)),
    "depthwise": (lambda **k: nn.Conv2d(4, 4, 3, groups=4, **k), nn.BatchNorm2d, (4, 6, 6)),
    "same": (lambda **k: nn.Conv2d(4, 6, 3, padding="same", **k), nn.BatchNorm2d, (4, 6, 6)),
    "conv3d": (lambda **k: nn.Conv3d(4, 6, 2, **k), nn.BatchNorm3d, (4, 3, 3, 3)),
    "linear": (lambda **k: nn.Linear(4, 6, **k), nn.BatchNorm1d, (4,)),
}


def randomize(norm, generator):
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if name == "running_var" else -0.5))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_folded_graph_answers_as_the_model(layer, bias, affine, generator):
    make, norm_class, shape = LAYERS[layer]
    first = make(bias=bias)
    norm = norm_class(first.weight.shape[0], affine=affine, eps=1e-3)
    randomize(norm, generator)
    model = nn.Sequential(first, norm, nn.ReLU()).eval()
    x = torch.randn(3, *shape, generator=generator)
    graph = capture(model, (x,))
    assert len(fold_batch_norm(graph)) == 1
    assert not any("batch_norm" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tiny_models_answer_the_same_after_folding(case):
    model = case.build()
    graph = captured(case)
    fold_batch_norm(graph)
    for want, have in zip(answers(model, case.data(rows=3)), answers(graph, case.data(rows=3)), strict=True):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-4)


class ReadTwice(nn.Module):
    """The convolution's own output is used beside the normalized one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class SharedConvolution(nn.Module):
    """One convolution, two batch-norms: the weight must not be changed for both."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x))))


def test_a_convolution_with_another_reader_is_left_alone(generator):
    model = ReadTwice().eval()
    randomize(model.norm, generator)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    graph = capture(model, (x,))
    assert len(fold_batch_norm(graph)) == 0
    torch.testing.assert_close(graph(x), model(x))


def test_a_shared_convolution_is_folded_separately_for_each_use(generator):
    model = SharedConvolution().eval()
    randomize(model.first, generator)
    randomize(model.second, generator)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    graph = capture(model, (x,))
    assert len(fold_batch_norm(graph)) == 2
    torch.testing.assert_close(graph(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [nn.ReLU(), nn.AvgPool2d(1), nn.Identity()])
def test_a_norm_after_anything_else_stays(first, generator):
    model = nn.Sequential(first, nn.BatchNorm2d(3)).eval()
    x = torch.randn(2, 3, 4, 4, generator=generator)
    graph = capture(model, (x,))
    assert len(fold_batch_norm(graph)) == 0
    torch.testing.assert_close(graph(x), model(x))


def test_a_dead_channel_folds_without_nan(generator):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_var.zero_()
    x = torch.randn(2, 3, 4, 4, generator=generator)
    graph = capture(model, (x,))
    fold_batch_norm(graph)
    assert torch.isfinite(graph(x)).all()


def test_a_norm_over_tokens_is_not_taken_for_one_over_channels(generator):
    """(rows, tokens, channels): torch normalizes dimension 1, the tokens, and here both have the same size."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    randomize(model[1], generator)
    x = torch.randn(3, 6, 4, generator=generator)
    graph = capture(model, (x,))
    assert not fold_batch_norm(graph)
    torch.testing.assert_close(graph(x), model(x))


def test_what_was_folded_is_told_with_its_layer(generator):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-2, affine=False), nn.ReLU()).eval()
    randomize(model[1], generator)
    graph = capture(model, (torch.randn(2, 3, 4, 4, generator=generator),))
    [(node, norm)] = fold_batch_norm(graph).items()
    assert node in graph.graph.nodes
    assert norm.epsilon == 1e-2
    assert torch.equal(norm.weight, model[0].weight)
    assert torch.equal(norm.bias, model[0].bias)
    assert torch.equal(norm.mean, model[1].running_mean)
    assert torch.equal(norm.variance, model[1].running_var)
    assert torch.equal(norm.gamma, torch.ones(4))
    assert torch.equal(norm.beta, torch.zeros(4))


def test_the_model_keeps_its_weights(generator):
    model = CASES["residual"].build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold_batch_norm(capture(model, CASES["residual"].data(rows=2)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
