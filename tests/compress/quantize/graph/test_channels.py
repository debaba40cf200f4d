"""Which channels can take a scale: judged by giving them one and looking at the answers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fettle.compress.capture import capture, layer_of
from fettle.compress.quantize.graph.channels import LAYER_NORM, LAYERS, find_streams, upper_limit
from fettle.compress.quantize.graph.fold import fold_batch_norm
from fettle.compress.quantize.graph.rescale import Rescaling
from fettle.testing.models import CASES
from fettle.testing.steps import answers, captured

ALL = (LAYER_NORM, *LAYERS)


def made(build):
    """A model in evaluation mode and its input, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = build()
    return model.eval(), x


class Between(nn.Module):
    """A layer, something in between given by a function, and a layer that reads it."""

    def __init__(self, first, between, second):
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def image(between, inputs=4):
    """Convolution to 4 × 6 × 6, something, convolution."""
    return lambda: (Between(nn.Conv2d(3, 4, 1), between, nn.Conv2d(inputs, 5, 1)), torch.randn(2, 3, 6, 6))


def flat(between, inputs):
    """Convolution to 4 × 6 × 6, something, linear layer."""
    return lambda: (Between(nn.Conv2d(3, 4, 1), between, nn.Linear(inputs, 5)), torch.randn(2, 3, 6, 6))


def tokens(between, *, width=4, first=8):
    """Linear layer to 6 tokens, something, linear layer."""
    return lambda: (Between(nn.Linear(3, first), between, nn.Linear(width, 5)), torch.randn(2, 6, 3))


def attention(x):
    """Packed projection of three, by shape: only the values keep their channels apart."""
    query, key, value = x.chunk(3, dim=-1)
    return functional.scaled_dot_product_attention(query, key, value)


def plain_attention(x):
    query, key, value = x.chunk(3, dim=-1)
    return (query @ key.transpose(1, 2)).softmax(dim=-1) @ value


# What lies between -> the channels that can be rescaled.
FREE = {
    "nothing": (image(lambda x: x), 4),
    "relu": (image(functional.relu), 4),
    "leaky relu": (image(lambda x: functional.leaky_relu(x, 0.3)), 4),
    "prelu": (image(nn.PReLU(4)), 4),
    "absolute": (image(torch.abs), 4),
    "max-pool": (image(lambda x: functional.max_pool2d(x, 3, padding=1)), 4),
    "average pool": (image(lambda x: functional.avg_pool2d(x, 3, padding=1)), 4),
    "adaptive pool": (image(lambda x: functional.adaptive_avg_pool2d(x, 2)), 4),
    "mean over pixels": (flat(lambda x: x.mean(dim=(2, 3)), 4), 4),
    "largest pixel": (flat(lambda x: x.amax(dim=(2, 3)), 4), 4),
    "flatten": (flat(lambda x: x.flatten(1), 144), 4),
    "flatten, channels last": (flat(lambda x: x.permute(0, 2, 3, 1).flatten(1), 144), 4),
    "pool, relu, flatten": (flat(lambda x: functional.relu(functional.avg_pool2d(x, 2)).flatten(1), 36), 4),
    "zero padding": (image(lambda x: functional.pad(x, (1, 2, 0, 1))), 4),
    "zero channels": (image(lambda x: functional.pad(x, (0, 0, 0, 0, 1, 2)), 7), 4),
    "reflection": (image(lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect")), 4),
    "shuffle": (image(lambda x: x.view(x.shape[0], 2, 2, 6, 6).transpose(1, 2).flatten(1, 2)), 4),
    "upsampling": (image(lambda x: functional.interpolate(x, scale_factor=2, mode="nearest")), 4),
    "half of the channels": (image(lambda x: x[:, :2], 2), 2),
    "two halves swapped": (image(lambda x: torch.cat(list(x.chunk(2, dim=1))[::-1], dim=1)), 4),
    "beside itself": (image(lambda x: torch.cat([x, functional.relu(x)], dim=1), 8), 4),
    "beside others": (image(lambda x: torch.cat([x, torch.sigmoid(x[:, :1])], dim=1), 5), 3),
    "gate": (image(lambda x: x * torch.sigmoid(torch.ones(1, 1, 6, 6))), 4),
    "number": (image(lambda x: x * 0.3 / 7), 4),
    "square": (image(lambda x: x * x), 0),
    "divisor": (image(lambda x: 1 / (3 + x.abs())), 0),
    "sum with itself": (image(lambda x: x + functional.relu(x)), 0),
    "bias": (image(lambda x: x + 1), 0),
    "padding with ones": (image(lambda x: functional.pad(x, (1, 1), value=1.0)), 0),
    "relu6": (image(functional.relu6), 0),
    "gelu": (image(functional.gelu), 0),
    "sigmoid": (image(torch.sigmoid), 0),
    "hardswish": (image(functional.hardswish), 0),
    "softmax": (image(lambda x: x.softmax(dim=1)), 0),
    "mean over channels": (image(lambda x: x.mean(dim=1, keepdim=True), 1), 0),
    "pixel shuffle": (image(lambda x: functional.pixel_shuffle(x, 2), 1), 0),
    "rows as channels": (image(lambda x: x.transpose(1, 2), 6), 0),
    "tokens": (tokens(lambda x: x, first=4), 4),
    "rows first": (tokens(lambda x: x.transpose(0, 1).reshape(-1, 4), first=4), 4),
    "attention": (tokens(attention, first=12), 4),
    "attention by products": (tokens(plain_attention, first=12), 4),
    "attention to itself": (tokens(lambda x: functional.scaled_dot_product_attention(x, x, x), first=4), 0),
    "mixing of tokens": (tokens(lambda x: torch.ones(6, 6).tril() @ x, first=4), 4),
}


@pytest.mark.parametrize("name", FREE)
def test_free_channels_are_found_and_a_scale_on_them_changes_nothing(name):
    build, expected = FREE[name]
    model, x = made(build)
    graph = capture(model, (x,))
    before = graph(x)
    streams = [stream for stream in find_streams(graph, (x,), sources=ALL) if layer_of(stream.source) == "first"]
    assert sum(int(stream.free.sum()) for stream in streams) == expected
    for stream in streams:
        rescaling = Rescaling(graph)
        scales = torch.where(stream.free, torch.linspace(0.1, 9.0, len(stream.free)), 1.0)
        rescaling.divide(stream, scales)
        rescaling.store()
        assert expected == 0 or not torch.equal(graph.get_buffer(str(stream.source.args[1])), model.first.weight)
    torch.testing.assert_close(graph(x), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_scale_on_the_free_channels_of_any_model_changes_nothing(case):
    model = case.build()
    graph = captured(case)
    fold_batch_norm(graph)
    generator = torch.Generator().manual_seed(1)
    rescaling = Rescaling(graph)
    for stream in find_streams(graph, case.data(rows=1), sources=ALL):
        scales = torch.exp(2 * torch.randn(len(stream.free), generator=generator))
        rescaling.divide(stream, torch.where(stream.free, scales, 1.0))
    rescaling.store()
    for want, have in zip(answers(model, case.data(rows=5)), answers(graph, case.data(rows=5)), strict=True):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-4)


ACTIVATIONS = {
    "none": nn.Identity, "relu": nn.ReLU, "leaky": nn.LeakyReLU, "relu6": nn.ReLU6, "pool": lambda: nn.MaxPool2d(2, 1),
    "gelu": nn.GELU,
}  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from(sorted(ACTIVATIONS))), min_size=2, max_size=4
    ),
    seed=st.integers(0, 99),
)
def test_any_chain_of_grouped_convolutions_keeps_its_function(layers, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chain = [
            module
            for groups, name in layers
            for module in (nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=seed % 2 == 0), ACTIVATIONS[name]())
        ]
        model, x = nn.Sequential(*chain, nn.Flatten(), nn.LazyLinear(3)).eval(), torch.randn(2, 4, 7, 7)
        want = model(x)
        graph = capture(model, (x,))
        rescaling = Rescaling(graph)
        for stream in find_streams(graph, (x,), sources=ALL):
            rescaling.divide(stream, torch.where(stream.free, torch.exp(torch.randn(4)), 1.0))
        rescaling.store()
        torch.testing.assert_close(graph(x), want, atol=1e-5, rtol=1e-4)


def test_columns_name_the_channel_that_each_input_reads():
    model, x = made(FREE["zero channels"][0])
    (stream,) = find_streams(capture(model, (x,)), (x,), sources=ALL)
    assert [columns.tolist() for columns in stream.readers.values()] == [[-1, 0, 1, 2, 3, -1, -1]]


def test_what_stops_a_channel_is_named():
    case = CASES["norm_last"]
    graph = captured(case)
    streams = {layer_of(s.source): s for s in find_streams(graph, case.data(rows=2), sources=(LAYER_NORM,))}
    assert [stop.target for stop in streams["layer.norm1"].stops] == [torch.ops.aten.add.Tensor]
    assert not streams["layer.norm1"].free.any()
    assert streams["layer.norm2"].free.all()


def test_shared_weights_are_left_alone():
    case = CASES["tied_weights"]
    graph = captured(case)
    assert not any(stream.free.any() for stream in find_streams(graph, case.data(rows=2), sources=ALL))


def test_a_norm_over_several_axes_or_without_weights_is_no_source():
    for norm in (nn.LayerNorm([6, 4]), nn.LayerNorm(4, elementwise_affine=False)):
        model = nn.Sequential(norm, nn.Linear(4, 3))
        x = torch.randn(2, 6, 4)
        assert not find_streams(capture(model, (x,)), (x,), sources=(LAYER_NORM,))


def test_the_example_may_have_any_number_of_rows():
    model, x = made(FREE["flatten"][0])
    graph = capture(model, (x,))
    for rows in (1, 2, 9):
        (stream,) = find_streams(graph, (x[:1].expand(rows, -1, -1, -1),), sources=ALL)
        assert stream.free.all()


@pytest.mark.parametrize(
    ("function", "limit"),
    [
        (functional.relu6, 6.0),
        (lambda x: functional.hardtanh(x, 0.0, 4.0), 4.0),
        (lambda x: x.clamp(0.0, 2.0), 2.0),
        (lambda x: x.clamp(-1.0, 2.0), None),
        (functional.hardtanh, None),
        (lambda x: x.clamp(min=0.0), None),
        (lambda x: x.clamp(max=2.0), None),
        (functional.relu, None),
    ],
)
def test_the_upper_limit_of_an_activation_from_zero(function, limit):
    model, x = made(image(function))
    graph = capture(model, (x,))
    (layer,) = [node for node in graph.graph.nodes if node.target in LAYERS and layer_of(node) == "first"]
    (activation,) = layer.users
    assert upper_limit(activation) == limit
    streams = [s for s in find_streams(graph, (x,), sources=LAYERS, through_clips=True) if s.clips]
    assert [list(stream.clips) for stream in streams] == ([[activation]] if limit else [])
