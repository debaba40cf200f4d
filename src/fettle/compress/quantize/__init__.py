"""Quantization methods, one file each."""

from fettle.compress.quantize.post_training import PostTraining

__all__ = ["PostTraining"]
