"""Observers: from a stream of activations to a range. One file each, found by its name."""

from fettle.compress.quantize.calibrate._base import Observer
from fettle.compress.quantize.calibrate._hooks import collect_ranges

__all__ = ["Observer", "collect_ranges"]
