"""Layers that learn in simulated quantization and answer in true integer arithmetic."""

from fettle.compress.quantize.layers.conv2d import QuantizedConv2d
from fettle.compress.quantize.layers.linear import QuantizedLinear

__all__ = ["QuantizedConv2d", "QuantizedLinear"]
