"""Runs in `.peers/torchao`: quantize an exported program with torchao's PT2E for x86, run it and time it.

usage: torchao_quantize.py FLOAT.pt2 DATA.npz OUTPUT.npz BATCHES ROUNDS TURN_S NARROW

DATA.npz holds `calibration` (n, ...) and `test` (m, ...), float32. BATCHES is comma-separated. OUTPUT.npz receives
`logits` (m, classes), and for each batch size B `int8_B` and `float_B` (ROUNDS,): the median milliseconds of each
round, int8 and float taking turns, both under torch.compile with frozen weights on one thread. NARROW is "1" for
activations of 7 bits, which CPUs without VNNI need, else "0".
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

CALIBRATION_ROWS = 100
WARMUP = 3


def main(
    float_path: str, data_path: str, output_path: str, batches: str, rounds: str, turn_s: str, narrow: str
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with np.load(data_path) as data:
        calibration, test = torch.from_numpy(data["calibration"]), torch.from_numpy(data["test"])
    program = torch.export.load(float_path)
    # Freezing works under no_grad only.
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        quantized = quantize(program.module(), calibration, narrow=narrow == "1")
        sizes = [int(size) for size in batches.split(",")]
        found = {"logits": answer(torch.compile(quantized, dynamic=False), test, rows=max(sizes)).numpy()}
        for size in sizes:
            calls = {
                f"{name}_{size}": load(model, test[:size])
                for name, model in (("int8", quantized), ("float", program.module()))
            }
            found |= take_turns(calls, rounds=int(rounds), turn_s=float(turn_s))
    np.savez(output_path, **found)


def quantize(model: torch.fx.GraphModule, calibration: Tensor, *, narrow: bool) -> torch.fx.GraphModule:
    """uint8 activations, int8 weights per channel: torchao's default for x86."""
    config = get_default_x86_inductor_quantization_config(reduce_range=narrow)
    quantizer = X86InductorQuantizer().set_global(config)
    prepared = prepare_pt2e(model, quantizer)
    for rows in calibration.split(CALIBRATION_ROWS):
        prepared(rows)
    converted = convert_pt2e(prepared)
    return move_exported_model_to_eval(converted)


def answer(model: Callable[[Tensor], Tensor], test: Tensor, *, rows: int) -> Tensor:
    """The logits (m, classes). The last call is filled up with the first rows: another shape would be compiled anew."""
    places = torch.arange(-(-len(test) // rows) * rows) % len(test)
    return torch.cat([model(test[part]) for part in places.split(rows)])[: len(test)]


def load(model: torch.fx.GraphModule, rows: Tensor) -> Callable[[], object]:
    """A call on these rows, compiled for their shape."""
    compiled = torch.compile(model, dynamic=False)
    compiled(rows)
    return lambda: compiled(rows)


def take_turns(calls: dict[str, Callable[[], object]], *, rounds: int, turn_s: float) -> dict[str, np.ndarray]:
    """The median milliseconds of each call in each round."""
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            medians[name].append(time_turn(calls[name], turn_s=turn_s))
    return {name: np.array(found) for name, found in medians.items()}


def time_turn(call: Callable[[], object], *, turn_s: float) -> float:
    for _ in range(WARMUP):
        call()
    samples_ms: list[float] = []
    end = time.perf_counter() + turn_s
    while len(samples_ms) < 3 or time.perf_counter() < end:
        before = time.perf_counter()
        call()
        samples_ms.append((time.perf_counter() - before) * 1e3)
    return statistics.median(samples_ms)


if __name__ == "__main__":
    main(*sys.argv[1:])
