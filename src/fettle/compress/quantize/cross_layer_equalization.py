"""Even out the channels between two layers: what one writes is divided by a scale that the next multiplies back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fettle.compress.capture import layer_of
from fettle.compress.quantize.graph.channels import LAYERS, Stream, find_streams, upper_limit
from fettle.compress.quantize.graph.rescale import Rescaling, folded_graph
from fettle.compress.step import Context, Step
from fettle.core.errors import UsageError

aten = torch.ops.aten
_CONVERGED = 1e-3  # of the natural logarithm of a scale


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossLayerEqualization(Step):
    """s_c = √(r_c / q_c): channel c is divided by s_c where it is computed, and multiplied by it where it is read.

    r_c: the largest absolute weight that computes channel c; q_c: the largest that reads it, in any of its readers.
    Afterwards both are √(r_c q_c), so that no channel hides among larger ones when a tensor is rounded to one grid.
    The function stays the same, because every operation in between passes a positive factor: ReLU, pooling, flatten,
    concatenation, a product with a gate, the values of an attention. Chains, such as a depthwise convolution between
    two others, are gone over until no scale changes.

    rounds: at most this many times over all layers.
    limit: of a channel's scale, which stays between 1 / limit and limit. Nor does a scale make a channel's bias
        larger than the largest bias of its layer was: that would be the activation's new peak.
    relax_clips: pass ReLU6 and its like too, whose limit is then raised as far as its most enlarged channel needs.
        Not exact: a channel that is enlarged less is cut later than it was.

    Goes before PostTraining; reads no data. Channels that are always zero, or whose values some other operation reads,
    stay as they are. Raises CaptureError, UsageError for a quantized model, DataError for weights that are not finite.
    Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[8.0, 2.0], [0.5, 0.0]]))
    ...     _ = model[2].weight.copy_(torch.tensor([[2.0, 2.0]]))
    >>> even = CrossLayerEqualization().apply(model, Context(example=(torch.ones(2, 2),)))
    >>> [value.tolist() for value in even.state_dict().values()]
    [[[4.0, 1.0], [1.0, 0.0]], [[4.0, 1.0]]]
    """

    shrinks: ClassVar[frozenset[str]] = frozenset()

    rounds: int = 40
    limit: float = 1e4
    relax_clips: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"rounds must be at least 1, got {self.rounds}")
        if not 1.0 < self.limit < float("inf"):
            raise UsageError(f"limit must be a finite number above 1, got {self.limit}")

    def apply(self, model: nn.Module, context: Context) -> GraphModule:
        graph = folded_graph(model, context, self.step_name())
        streams = find_streams(graph, context.example, sources=LAYERS, through_clips=self.relax_clips)
        streams = [stream for stream in streams if stream.free.any()]
        rescaling = Rescaling(graph)
        totals = self._equalize(streams, rescaling, context)
        _raise_limits(streams, totals)
        rescaling.store()
        context.progress(1.0)
        context.note(_account(streams, totals))
        return graph

    def _equalize(self, streams: list[Stream], rescaling: Rescaling, context: Context) -> list[torch.Tensor]:
        """For each stream (C,): by what its channels were divided in all."""
        lowest = [self._lowest(stream, rescaling) for stream in streams]
        totals = [torch.ones_like(low) for low in lowest]
        for number in range(self.rounds):
            change = 0.0
            for index, stream in enumerate(streams):
                wanted = totals[index] * scales_between(stream, rescaling)
                total = wanted.clamp(lowest[index], torch.tensor(self.limit, dtype=torch.float64))
                total = torch.where(stream.free, total, 1.0)
                rescaling.divide(stream, total / totals[index])
                change = max(change, float((total / totals[index]).log().abs().max()))
                totals[index] = total
            context.progress((number + 1) / self.rounds)
            if change < _CONVERGED:
                break
        return totals

    def _lowest(self, stream: Stream, rescaling: Rescaling) -> torch.Tensor:
        """(C,): the least scale that keeps each bias within the largest of its layer."""
        floor = torch.full((len(stream.free),), 1 / self.limit, dtype=torch.float64)
        bias = rescaling.bias(stream.source)
        if bias is None or not bias.any():
            return floor
        return torch.maximum(floor, bias.abs() / bias.abs().max())


def scales_between(stream: Stream, rescaling: Rescaling) -> torch.Tensor:
    """(C,): √(r / q) with the weights as they stand; 1 where a channel is not free, or its weights are all zero."""
    rows, columns = rescaling.rows(stream), rescaling.columns(stream)
    alive = stream.free & (rows > 0) & (columns > 0)
    return torch.where(alive, (rows / columns.where(alive, torch.ones_like(columns))).sqrt(), 1.0)


def _raise_limits(streams: list[Stream], totals: list[torch.Tensor]) -> None:
    """Cut each clip off where its most enlarged channel needs it."""
    gains: dict[Node, float] = {}
    for stream, total in zip(streams, totals, strict=True):
        # Channels of layers without a stream keep their scale.
        gain_of = torch.cat([1 / total, torch.ones(1, dtype=total.dtype)])
        for clip, channels in stream.clips.items():
            gains[clip] = max(gains.get(clip, 0.0), float(gain_of[channels[channels >= 0]].max()))
    for clip, gain in gains.items():
        limit = upper_limit(clip)
        assert limit is not None
        clip.target, clip.args = aten.hardtanh.default, (clip.args[0], 0.0, limit * gain)


def _account(streams: list[Stream], totals: list[torch.Tensor]) -> str:
    """One sentence for the report."""
    moved = [
        (stream, total) for stream, total in zip(streams, totals, strict=True) if (total.log().abs() > _CONVERGED).any()
    ]
    if not moved:
        return "cross-layer equalization: nothing to equalize"
    pairs = sum(bool((columns >= 0).any()) for stream, _ in moved for columns in stream.readers.values())
    largest = max(float(total.log().abs().max().exp()) for _, total in moved)
    names = ", ".join(dict.fromkeys(layer_of(stream.source) for stream, _ in moved[:3]))
    more = ", ..." if len(moved) > 3 else ""
    return (
        f"cross-layer equalization: {pairs} pairs of layers were equalized (after {names}{more}), "
        f"channels scaled by at most {largest:.3g}"
    )
