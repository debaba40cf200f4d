"""Divide the channels that a layer writes, and multiply them back in the layers that read them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fettle.compress.capture import capture, layer_of
from fettle.compress.quantize.graph.channels import Stream, weight_position
from fettle.compress.quantize.graph.constants import constant, drop_unused, put_constant
from fettle.compress.quantize.graph.prepare import prepare
from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.step import Context
from fettle.core.errors import DataError, UsageError

aten = torch.ops.aten


def folded_graph(model: torch.nn.Module, context: Context, step: str) -> GraphModule:
    """The model captured, with batch-norm folded. Raises CaptureError, and UsageError for a quantized model."""
    if isinstance(model, Simulated):
        raise UsageError(f"{step} rescales float weights, got a quantized model: put it before quantize.post_training")
    graph = capture(model, context.example)
    prepare(graph)
    return graph


class Rescaling:
    """Weights of a graph on their way to other scales, in float64; `store` writes them, the function stays the same.

    Raises DataError for a weight that is not finite. C: channels of a stream's source.

    >>> from fettle.compress.quantize.graph.channels import LAYERS, find_streams
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)), torch.ones(2, 2)
    >>> graph = capture(model, (x,))
    >>> (stream,) = find_streams(graph, (x,), sources=LAYERS)
    >>> rescaling = Rescaling(graph)
    >>> rescaling.divide(stream, torch.tensor([1.0, 2.0, 0.5]))
    >>> rescaling.store()
    >>> bool(torch.allclose(graph(x), model(x)))
    True
    """

    def __init__(self, graph: GraphModule) -> None:
        self._graph = graph
        self._weights: dict[Node, torch.Tensor] = {}
        self._biases: dict[Node, torch.Tensor | None] = {}

    def load(self, stream: Stream) -> None:
        """Take up, and so check, every weight that dividing the stream's channels would touch."""
        for layer in (stream.source, *stream.readers):
            self._load(layer)

    def weight(self, layer: Node) -> torch.Tensor:
        """The weight as it stands."""
        self._load(layer)
        return self._weights[layer]

    def bias(self, layer: Node) -> torch.Tensor | None:
        """The bias as it stands."""
        self._load(layer)
        return self._biases[layer]

    def rows(self, stream: Stream) -> torch.Tensor:
        """(C,): the largest absolute weight with which the source computes each channel."""
        return self.weight(stream.source).abs().reshape(len(stream.free), -1).amax(dim=1)

    def columns(self, stream: Stream) -> torch.Tensor:
        """(C,): the largest absolute weight with which any reader takes each channel; 0 where none does."""
        largest = torch.zeros(len(stream.free), dtype=torch.float64)
        for reader, channels in stream.readers.items():
            grouped = _by_input(self.weight(reader).abs(), reader)
            of_input = grouped.amax(dim=(1, 3)).flatten()  # (inputs,)
            largest.scatter_reduce_(0, channels[channels >= 0], of_input[channels >= 0], "amax")
        return largest

    def divide(self, stream: Stream, scales: torch.Tensor) -> None:
        """Divide each channel by its scale in the source and multiply by it in the readers. scales: (C,) > 0."""
        scales = scales.to(torch.float64)
        weight, bias = self.weight(stream.source), self.bias(stream.source)
        self._weights[stream.source] = weight / scales.reshape(-1, *[1] * (weight.ndim - 1))
        self._biases[stream.source] = None if bias is None else bias / scales
        for reader, channels in stream.readers.items():
            of_input = torch.where(channels >= 0, scales[channels.clamp_min(0)], 1.0)
            weight = self.weight(reader)
            grouped = _by_input(weight, reader)
            groups = grouped.shape[0]
            self._weights[reader] = (grouped * of_input.reshape(groups, 1, -1, 1)).reshape(weight.shape)

    def store(self) -> None:
        """Write every weight that was touched into the graph, in its own data type."""
        for layer, weight in self._weights.items():
            at, bias = weight_position(layer), self._biases[layer]
            arguments = list(layer.args)
            with self._graph.graph.inserting_before(layer):
                kind = constant(self._graph, arguments[at]).dtype
                arguments[at] = put_constant(self._graph, f"{layer.name}_weight", weight.to(kind))
                if bias is not None:
                    arguments[at + 1] = put_constant(self._graph, f"{layer.name}_bias", bias.to(kind))
            layer.args = tuple(arguments)
        self._graph.graph.eliminate_dead_code()
        self._graph.graph.lint()
        self._graph.recompile()
        drop_unused(self._graph)

    def _load(self, layer: Node) -> None:
        if layer in self._weights:
            return
        at = weight_position(layer)
        weight = constant(self._graph, layer.args[at])
        bias = layer.args[at + 1] if len(layer.args) > at + 1 else None
        self._weights[layer] = weight.to(torch.float64)
        self._biases[layer] = None if bias is None else constant(self._graph, bias).to(torch.float64)
        for value in (self._weights[layer], self._biases[layer]):
            if value is not None and not torch.isfinite(value).all():
                raise DataError(f"a weight to be rescaled must be finite, got NaN or infinity in {layer_of(layer)}")


def _by_input(weight: torch.Tensor, layer: Node) -> torch.Tensor:
    """(groups, outputs of a group, inputs of a group, positions): a grouped convolution's groups read apart."""
    count = layer.args[6] if len(layer.args) > 6 else 1
    groups = count if isinstance(count, int) else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
