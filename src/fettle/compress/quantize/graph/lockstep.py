"""Run a simulated model and the float model it stands for side by side, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Interpreter

from fettle.compress.capture import quiet
from fettle.compress.quantize.graph.modules import ActivationQuantizer, SimulatedLayer
from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.numerics.grid import all_finite
from fettle.compress.step import Tensors
from fettle.core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moment:
    """A layer as both models have just computed it.

    read, wrote: its input and output in the simulated model; read_in_float, wrote_in_float: the same in float.
    """

    layer: SimulatedLayer
    read: torch.Tensor
    wrote: torch.Tensor
    read_in_float: torch.Tensor
    wrote_in_float: torch.Tensor

    def mean_error(self, wrote: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(C,) the mean error of each channel of what it wrote, and the same shaped to be subtracted."""
        wrote = self.wrote if wrote is None else wrote
        shape = self.layer.channels(wrote.ndim)
        error = (wrote - self.wrote_in_float).mean(dim=[axis for axis, size in enumerate(shape) if size == 1])
        return error, error.reshape(shape)


# -> the output to go on with, or None to leave it as it is.
Visit = Callable[[Moment], torch.Tensor | None]


def run_lockstep(simulated: Simulated, inputs: Tensors, visit: Visit) -> tuple[Any, Any]:
    """Show each layer with both outputs to `visit`, in order of execution; return (float outputs, simulated outputs).

    inputs: one batch of any size. The float side computes with unrounded weights, no quantizer and no correction. What
    `visit` changes in a layer, and the output it returns, is what the layers after it read: a correction sees the
    errors that those before it left. Memory holds the live tensors of both sides.
    """
    original = _Original(simulated.body)
    rounded = Interpreter(simulated.body)
    layers = simulated.layers()
    with quiet(), torch.no_grad():
        for side in (original, rounded):
            side.env, side.args_iter = {}, iter(inputs)
        for node in simulated.graph.nodes:
            before, after = original.run_node(node), rounded.run_node(node)
            if node in layers:
                moment = Moment(
                    layer=layers[node],
                    read=rounded.env[node.args[0]],
                    wrote=after,
                    read_in_float=original.env[node.args[0]],
                    wrote_in_float=before,
                )
                changed = visit(moment)
                after = after if changed is None else changed
            if node.op == "output":
                return before, after
            for side, value in ((original, before), (rounded, after)):
                side.env[node] = value
                for dead in side.user_to_last_uses.get(node, ()):
                    del side.env[dead]
    raise AssertionError("a graph ends with its output")


class _Original(Interpreter):
    """The same graph without any rounding."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, SimulatedLayer):
            return module.compute(args[0], module.weight, module.bias)
        return args[0] if isinstance(module, ActivationQuantizer) else module(*args, **kwargs)


def gather(batches: Iterable[Tensors], *, rows: int) -> Tensors:
    """The first `rows` rows of the batches as one. Raises DataError where there is none, and for NaN or infinity."""
    parts: list[Tensors] = []
    count = 0
    for index, batch in enumerate(batches):
        if not all(all_finite(tensor) for tensor in batch if tensor.is_floating_point()):
            raise DataError(f"calibration batch {index} must be finite, got NaN or infinity")
        parts.append(batch)
        count += len(batch[0])
        if count >= rows:
            break
    if not count:
        raise DataError("the calibration set must hold at least one row, got none")
    return tuple(torch.cat(columns)[:rows] for columns in zip(*parts, strict=True))


def affordable_rows(simulated: Simulated, *, rows: int, limit_bytes: int = 256 * 2**20) -> int:
    """At most `rows`, and so few that the largest tensor of the graph stays within the limit; at least one."""
    largest = 1
    for node in simulated.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.ndim:
            sizes = [int(size) for size in value.shape[1:] if isinstance(size, int)]
            largest = max(largest, 4 * int(torch.tensor(sizes or [1]).prod()))
    return max(1, min(rows, limit_bytes // largest))
