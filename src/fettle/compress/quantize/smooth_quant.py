"""Move what is hard to quantize from activations into the weights that read them, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fettle.compress.capture import layer_of
from fettle.compress.quantize.calibrate._base import Observer, extremes
from fettle.compress.quantize.graph.channels import LAYER_NORM, LAYERS, Stream, channel_axis, find_streams
from fettle.compress.quantize.graph.rescale import Rescaling, folded_graph
from fettle.compress.quantize.post_training import calibrate
from fettle.compress.step import Context, Step
from fettle.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant(Step):
    """s_j = max|X_j|^α / max|W_j|^(1 − α): channel j of X is divided by s_j, and column j of W multiplied by it.

    X: what linear layers read, on the calibration batches; W: their weights, the largest in any reader. The division
    costs nothing: it goes into γ and β of the layer norm that writes X, or into the rows of the linear layer or
    convolution that does, wherever the operations in between pass it (`graph/channels.py`): packed and separate
    projections, the values of an attention, a ReLU. The function stays the same, and a channel a hundred times the
    others no longer takes the whole grid.

    alpha: how much moves: 0 evens out the weights alone, 1 the activations alone.
    batches: at most this many calibration batches are read; memory does not depend on their number.
    convolutions: also where the layer that reads is a convolution.

    Goes before PostTraining. A layer norm whose output something else reads, such as a residual branch, stays as it is
    and is named through `context.note`. Raises CaptureError, UsageError for a quantized model, DataError for an empty
    calibration set, NaN or infinity in it or in the weights. Xiao et al. 2022, "SmoothQuant: Accurate and Efficient
    Post-Training Quantization for Large Language Models", equation 4.

    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).eval()
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([1.0, 1.0, 100.0, 1.0]))
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> smooth = SmoothQuant().apply(model, Context(example=(x[:2],), calibration=[(x,)]))
    >>> bool(torch.allclose(smooth(x), model(x), atol=1e-4))
    True
    """

    shrinks: ClassVar[frozenset[str]] = frozenset()

    alpha: float = 0.5
    batches: int = 100
    convolutions: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise UsageError(f"alpha must be between 0 and 1, got {self.alpha}")
        if self.batches < 1:
            raise UsageError(f"batches must be at least 1, got {self.batches}")

    def apply(self, model: nn.Module, context: Context) -> GraphModule:
        graph = folded_graph(model, context, self.step_name())
        streams = find_streams(graph, context.example, sources=(LAYER_NORM, *LAYERS))
        chosen = [stream for stream in streams if stream.free.any() and self._reads(stream)]
        for stream in streams:
            if stream.source.target == LAYER_NORM and not stream.free.all() and stream.stops:
                context.note(_obstacle(stream))
        if not chosen:
            context.note("SmoothQuant: nothing to smooth: no linear layer reads a layer norm or another layer alone")
            context.progress(1.0)
            return graph
        rescaling = Rescaling(graph)
        for stream in chosen:
            rescaling.load(stream)  # a bad weight is named as one, before data that went through it is called bad
        peaks = self._peaks(graph, chosen, context)
        largest = 1.0
        for stream in chosen:
            scales = smoothing_scales(
                peaks=_by_channel(stream, peaks),
                weights=rescaling.columns(stream),
                free=stream.free,
                alpha=self.alpha,
            )
            rescaling.divide(stream, scales)
            largest = max(largest, float(scales.max() / scales.min()))
        rescaling.store()
        names = ", ".join(dict.fromkeys(layer_of(stream.source) for stream in chosen[:3]))
        more = ", ..." if len(chosen) > 3 else ""
        context.note(
            f"SmoothQuant: the outputs of {len(chosen)} layers were smoothed ({names}{more}), "
            f"channels of one tensor scaled apart by at most {largest:.3g}"
        )
        return graph

    def _reads(self, stream: Stream) -> bool:
        linear = all(reader.target == torch.ops.aten.linear.default for reader in stream.readers)
        return linear or self.convolutions

    def _peaks(self, graph: GraphModule, streams: list[Stream], context: Context) -> dict[Node, torch.Tensor]:
        """For each reader (inputs,): the largest absolute value in each of its input channels."""
        readers = {reader: None for stream in streams for reader in stream.readers}
        # One tensor may be read by several layers, along the same axis.
        operands: dict[Node, Observer] = {}
        for reader in readers:
            operand = reader.args[0]
            assert isinstance(operand, Node)
            operands.setdefault(operand, _ChannelPeaks(channel_axis(reader)))
        calibrate(graph, operands, context, limit=self.batches)
        found = {}
        for reader in readers:
            observer = operands[reader.args[0]]  # type: ignore[index]
            assert isinstance(observer, _ChannelPeaks)
            found[reader] = observer.peaks
        return found


def smoothing_scales(*, peaks: torch.Tensor, weights: torch.Tensor, free: torch.Tensor, alpha: float) -> torch.Tensor:
    """(C,) float64: peaks^α / weights^(1 − α), times the factor that leaves the largest peak as it is.

    peaks, weights: (C,), the largest absolute activation and weight of each channel. A channel that is not free, or
    has a zero in either, gets 1. The factor changes nothing where all channels are free, and keeps the rest of
    a tensor in proportion where some are not.

    >>> ones = torch.ones(3)
    >>> smoothing_scales(peaks=torch.tensor([1.0, 1.0, 100.0]), weights=ones, free=ones > 0, alpha=0.5).tolist()
    [0.1, 0.1, 1.0]
    """
    peaks, weights = peaks.to(torch.float64), weights.to(torch.float64)
    alive = free & (peaks > 0) & (weights > 0)
    if not alive.any():
        return torch.ones_like(peaks)
    ones = torch.ones_like(peaks)
    scales = torch.where(alive, peaks, ones) ** alpha / torch.where(alive, weights, ones) ** (1 - alpha)
    factor = (peaks / scales)[alive].max() / peaks[alive].max()
    return torch.where(alive, scales * factor, ones)


def _by_channel(stream: Stream, peaks: dict[Node, torch.Tensor]) -> torch.Tensor:
    """(C,): the largest over the columns of all readers that read the channel."""
    largest = torch.zeros(len(stream.free), dtype=torch.float64)
    for reader, channels in stream.readers.items():
        own = channels >= 0
        largest.scatter_reduce_(0, channels[own], peaks[reader][own].to(torch.float64), "amax")
    return largest


def _obstacle(stream: Stream) -> str:
    names = ", ".join(dict.fromkeys(f"{stop.name} in {layer_of(stop)}" for stop in stream.stops[:3]))
    kept = "not smoothed" if not stream.free.any() else "smoothed in part"
    return f"{layer_of(stream.source)}: {kept}: its output is also read by {names}, where no scale can be undone"


class _ChannelPeaks(Observer):
    """The largest absolute value of each channel along one axis, counted from the end."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self._axis = axis
        self.peaks = torch.zeros(0)

    def update(self, values: torch.Tensor) -> None:
        extremes(values)  # raises for what is not finite
        axis = values.ndim + self._axis
        found = values.detach().abs().amax(dim=[at for at in range(values.ndim) if at != axis])
        self.peaks = found if not len(self.peaks) else torch.maximum(self.peaks, found)

    def range(self) -> tuple[float, float]:
        largest = float(self.peaks.max())
        return -largest, largest
