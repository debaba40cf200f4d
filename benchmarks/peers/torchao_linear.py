"""Runs in `.peers/torchao`: quantize the linear layers of `linear_encoder.py` with torchao, compile, run and time it.

usage: torchao_linear.py LAYERS DATA.npz CONFIG OUTPUT.npz BATCHES ROUNDS TURN_S

CONFIG is "float", "int8-dynamic", "int8-weights" or "int4-weights". DATA.npz holds `x` (n, ...) float32. BATCHES is
comma-separated. OUTPUT.npz receives `outputs` (n, ...), and for each batch size B `ms_B` (ROUNDS,): the median
milliseconds of each round under torch.compile with frozen weights on one thread.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup

sys.path.insert(0, str(Path(__file__).parents[1]))
from linear_encoder import build_encoder

CONFIGS = {
    "int8-dynamic": Int8DynamicActivationInt8WeightConfig,
    "int8-weights": Int8WeightOnlyConfig,
    # Int4WeightOnlyConfig has no packing for CPUs in 0.18.
    "int4-weights": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)),
}


def main(layers: str, data: str, config: str, output: str, batches: str, rounds: str, turn_s: str) -> None:
    torch.set_num_threads(1)
    model = build_encoder(int(layers))
    if config in CONFIGS:
        quantize_(model, CONFIGS[config]())
    with np.load(data) as arrays:
        x = torch.from_numpy(arrays["x"])
    compiled = torch.compile(model, dynamic=False)
    found = {}
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        for batch in map(int, batches.split(",")):
            rows = x[:batch].clone()
            for _ in range(3):
                compiled(rows)
            found[f"ms_{batch}"] = np.array([turn(compiled, rows, float(turn_s)) for _ in range(int(rounds))])
            outputs = compiled(rows)
    np.savez(output, outputs=outputs.numpy(), **found)


def turn(call, rows, turn_s: float) -> float:
    """The median milliseconds of as many calls as fit."""
    samples, end = [], time.perf_counter() + turn_s
    while len(samples) < 3 or time.perf_counter() < end:
        before = time.perf_counter()
        call(rows)
        samples.append((time.perf_counter() - before) * 1e3)
    return statistics.median(samples)


if __name__ == "__main__":
    main(*sys.argv[1:])
