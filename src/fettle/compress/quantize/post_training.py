"""Static int8 post-training quantization: capture, fold, place, calibrate, convert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import Interpreter, Node

from fettle.compress.batches import input_batches
from fettle.compress.capture import capture, check_layer_names, layer_of, quiet
from fettle.compress.quantize.calibrate._base import Observer
from fettle.compress.quantize.graph.constants import constant, is_constant
from fettle.compress.quantize.graph.fold import FoldedNorm
from fettle.compress.quantize.graph.placement import ANCHORS, place
from fettle.compress.quantize.graph.prepare import prepare
from fettle.compress.quantize.graph.simulate import Simulated, simulate
from fettle.compress.quantize.numerics.grid import all_finite, grid_for_range
from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.compress.step import Context, Step, Tensors
from fettle.core import plugins
from fettle.core.errors import DataError, FettleError, UsageError

_ACTIVATION = Scheme(bits=8)
_BATCH_STATISTICS = (
    torch.ops.aten._native_batch_norm_legit.default,
    torch.ops.aten._native_batch_norm_legit.no_stats,
    torch.ops.aten._native_batch_norm_legit_functional.default,
)
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class PostTraining(Step):
    """Weights int8, symmetric per output channel; activations uint8, affine per tensor; biases int32.

    observer: how an activation's range is found, a file name in `calibrate/`.
    batches: at most this many calibration batches are read; memory does not depend on their number.
    weight_bits: of the weights, 2 to 8. Runtimes compute with 8 whatever is asked, so fewer cost accuracy and win no
        time; they are for judging and training low-bit weights.
    keep_float: layers that stay float, by name; a module's name stands for all layers in it.
    small_share: layers that read one position a row, such as a gate's and a head's, stay float where they do at most
        this share of the model's multiplications; 0 to round them too.

    What cannot be quantized stays float and is told through `context.note`; so is a layer that `forward` never reaches,
    which is left out, and a model in training mode, which is taken as in evaluation. Raises CaptureError, DataError for
    an empty calibration set or NaN in it, UsageError for a layer name that the model does not have.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    >>> quantized = PostTraining().apply(model, Context(example=(x[:2],), calibration=[(x,)]))
    >>> bool((quantized(x) - model(x)).abs().max() < 0.05)
    True
    """

    precision: ClassVar[str] = "int8"

    observer: str = "histogram_mse"
    batches: int = 100
    weight_bits: int = 8
    keep_float: tuple[str, ...] = ()
    small_share: float = 0.01

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise UsageError(f"batches must be at least 1, got {self.batches}")
        if not 0.0 <= self.small_share < 1.0:
            raise UsageError(f"small_share must be 0 or more and less than 1, got {self.small_share}")
        if not 2 <= self.weight_bits <= 8:
            raise UsageError(f"weight_bits must be 2 to 8, got {self.weight_bits}")

    def apply(self, model: torch.nn.Module, context: Context) -> Simulated:
        return self.quantize(model, context)[0]

    def quantize(self, model: torch.nn.Module, context: Context) -> tuple[Simulated, dict[Node, FoldedNorm]]:
        """What `apply` returns, with the batch-norms that were folded, by the node of their layer."""
        if isinstance(model, Simulated):
            raise UsageError(f"{self.step_name()} takes a float model, got one that is quantized already: leave it out")
        observer = plugins.load("fettle.compress.quantize.calibrate", self.observer, Observer)
        graph = capture(model, context.example)
        surprises = list(_surprises(model, graph))
        norms = prepare(graph)
        check_layer_names([node for node in graph.graph.nodes if node.target in ANCHORS], self.keep_float)
        placement = place(graph, keep_float=self.keep_float, small_share=self.small_share)
        if not placement.anchors:
            context.note("nothing was quantized: no convolution or linear layer with constant weights was found")
        for anchor in placement.anchors:  # before any data is read, whose NaN it would be taken for
            if not all_finite(constant(graph, anchor.args[1])):
                raise DataError(f"a weight to be quantized must be finite, got NaN or infinity in {layer_of(anchor)}")
        observers = {node: observer() for node in placement.observed}
        if observers:
            calibrate(graph, observers, context, limit=self.batches)
        parameters = {node: grid_for_range(*seen.range(), _ACTIVATION) for node, seen in observers.items()}
        for sentence in (*surprises, *placement.left_float):
            context.note(sentence)
        return simulate(graph, placement, parameters, weight_bits=self.weight_bits), norms


def _surprises(model: nn.Module, graph: torch.fx.GraphModule) -> Iterator[str]:
    """What the owner of this model may not expect of its capture, before anything in it is changed."""
    if isinstance(model, torch.fx.GraphModule):  # has no modes, and holds no layers besides its operations
        return
    if any(module.training for module in model.modules()):
        yield "the model was in training mode; quantized as in evaluation"
    for node in graph.graph.nodes:
        if node.target in _BATCH_STATISTICS:
            yield (
                f"{layer_of(node)}: batch-norm takes its statistics from the batch in evaluation too, so an answer "
                "depends on the rows beside it; it stays float"
            )
    called = {layer_of(node) for node in graph.graph.nodes if node.op == "call_function"}
    # torch's attention reads the weight of its projection without calling it.
    read = {str(node.target) for node in graph.graph.nodes if is_constant(node) and node.users}
    for name, module in model.named_modules():
        if isinstance(module, _WEIGHTED) and name and name not in called and f"{name}.weight" not in read:
            yield f"{name}: never reached by forward, left out"


def calibrate(graph: torch.fx.GraphModule, observers: dict[Node, Observer], context: Context, *, limit: int) -> None:
    """Run at most `limit` batches through the graph and show each observed tensor to its observer.

    Raises DataError for an empty set, for a batch that the model refuses, and for NaN or infinity, naming the batch and
    the layer.
    """
    watching = _Watcher(graph, observers)
    count = 0
    with quiet(), torch.no_grad():
        for batch in islice(input_batches(context.calibration, context.example), limit):
            watching.batch = count
            watching.show(batch)
            count += 1
            context.progress(min(count / limit, 1.0))
    if count == 0:
        raise DataError("the calibration set must hold at least one batch, got none")
    context.progress(1.0)


class _Watcher(Interpreter):
    """Runs the graph and shows what it computes."""

    def __init__(self, graph: torch.fx.GraphModule, observers: dict[Node, Observer]) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # it would put source lines behind the sentence of an error
        self._observers = observers
        self.batch = 0

    def show(self, batch: Tensors) -> None:
        """Run one batch. Raises DataError where the model cannot take it."""
        try:
            self.run(*batch)
        except FettleError:
            raise
        except Exception as problem:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in batch)
            first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise DataError(
                f"calibration batch {self.batch}, of shape {shapes}, must fit the model: {first}"
            ) from problem

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        observer = self._observers.get(n)
        if observer is not None:
            try:
                observer.update(value)
            except DataError as problem:
                where = "the inputs" if n.op == "placeholder" else f"the output of {layer_of(n)}"
                raise DataError(f"{where} of batch {self.batch}: {problem}") from None
        return value
