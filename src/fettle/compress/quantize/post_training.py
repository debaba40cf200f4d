"""Static int8 post-training quantization: capture, fold, place, calibrate, convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Interpreter, Node

from fettle.compress.capture import capture, layer_of, quiet
from fettle.compress.quantize.calibrate._base import Observer
from fettle.compress.quantize.graph.constants import drop_unused
from fettle.compress.quantize.graph.convert import insert_quantizers
from fettle.compress.quantize.graph.fold import fold_batch_norm
from fettle.compress.quantize.graph.placement import place
from fettle.compress.quantize.numerics.affine import affine_for_range
from fettle.compress.step import Context, Step, Tensors
from fettle.core import plugins
from fettle.core.errors import DataError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class PostTraining(Step):
    """Weights int8, symmetric per output channel; activations uint8, affine per tensor; biases int32.

    observer: how an activation's range is found, a file name in `calibrate/`.
    batches: at most this many calibration batches are read; memory does not depend on their number.
    keep_float: layers, by name, that stay float.

    What cannot be quantized stays float and is told through `context.note`. Raises CaptureError, DataError for an
    empty calibration set or NaN in it, UsageError for a layer name that the model does not have.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    >>> quantized = PostTraining().apply(model, Context(example=(x[:2],), calibration=[(x,)]))
    >>> bool((quantized(x) - model(x)).abs().max() < 0.05)
    True
    """

    precision: ClassVar[str] = "int8"

    observer: str = "histogram_mse"
    batches: int = 100
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise UsageError(f"batches must be at least 1, got {self.batches}")

    def apply(self, model: torch.nn.Module, context: Context) -> torch.nn.Module:
        observer = plugins.load("fettle.compress.quantize.calibrate", self.observer, Observer)
        graph = capture(model, context.example)
        fold_batch_norm(graph)
        self._check_names(graph)
        placement = place(graph, keep_float=self.keep_float)
        if not placement.anchors:
            context.note("nothing was quantized: no convolution or linear layer with constant weights was found")
        observers = {node: observer() for node in placement.observed}
        if observers:
            calibrate(graph, observers, context, limit=self.batches)
        parameters = {node: affine_for_range(*seen.range()) for node, seen in observers.items()}
        insert_quantizers(graph, placement, parameters)
        drop_unused(graph)
        for sentence in placement.left_float:
            context.note(sentence)
        return graph

    def _check_names(self, graph: torch.fx.GraphModule) -> None:
        layers = {layer_of(node) for node in graph.graph.nodes if node.op == "call_function"}
        for name in self.keep_float:
            if name not in layers:
                raise UsageError(
                    f"keep_float names no layer of the model: '{name}'. Layers: {', '.join(sorted(layers))}"
                )


def calibrate(graph: torch.fx.GraphModule, observers: dict[Node, Observer], context: Context, *, limit: int) -> None:
    """Run at most `limit` batches through the graph and show each observed tensor to its observer.

    Raises DataError for an empty set, and for NaN or infinity, naming the batch and the layer.
    """
    watching = _Watcher(graph, observers)
    count = 0
    with quiet(), torch.no_grad():
        for batch in _first(context.calibration, limit):
            watching.batch = count
            watching.run(*batch)
            count += 1
            context.progress(min(count / limit, 1.0))
    if count == 0:
        raise DataError("the calibration set must hold at least one batch, got none")
    context.progress(1.0)


def _first(batches: Iterable[Tensors], limit: int) -> Iterable[Tensors]:
    for index, batch in enumerate(batches):
        if index == limit:
            return
        yield batch


class _Watcher(Interpreter):
    """Runs the graph and shows what it computes."""

    def __init__(self, graph: torch.fx.GraphModule, observers: dict[Node, Observer]) -> None:
        super().__init__(graph)
        self._observers = observers
        self.batch = 0

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        observer = self._observers.get(n)
        if observer is not None:
            if not torch.isfinite(value).all():
                where = "the inputs" if n.op == "placeholder" else f"the output of {layer_of(n)}"
                raise DataError(
                    f"calibration data must stay finite, got NaN or infinity in {where} of batch {self.batch}"
                )
            observer.update(value)
        return value
