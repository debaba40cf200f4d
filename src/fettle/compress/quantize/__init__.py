"""Quantization methods, one file each.

    float model   -> CrossLayerEqualization, SmoothQuant                 -> float model
    float model   -> PostTraining, QuantizationAware                     -> simulated model
    simulated     -> AdaRound, BiasCorrection, WideSums, GiveBack        -> simulated model
    float model   -> WeightOnly, Dynamic                                 -> model whose linear layers hold integers
    float model   -> Half                                                -> model in 16 bits

A simulated model runs in torch and is lowered to integers when it is exported: see `graph/`.
"""

from fettle.compress.quantize.adaround import AdaRound
from fettle.compress.quantize.bias_correction import BiasCorrection
from fettle.compress.quantize.cross_layer_equalization import CrossLayerEqualization
from fettle.compress.quantize.dynamic import Dynamic
from fettle.compress.quantize.give_back import GiveBack
from fettle.compress.quantize.half import Half
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.quantize.qat import QuantizationAware
from fettle.compress.quantize.smooth_quant import SmoothQuant
from fettle.compress.quantize.weight_only import WeightOnly
from fettle.compress.quantize.wide_sums import WideSums

__all__ = [
    "AdaRound",
    "BiasCorrection",
    "CrossLayerEqualization",
    "Dynamic",
    "GiveBack",
    "Half",
    "PostTraining",
    "QuantizationAware",
    "SmoothQuant",
    "WeightOnly",
    "WideSums",
]
