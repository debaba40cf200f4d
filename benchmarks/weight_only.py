"""Linear layers in few bits: size, latency and nearness to float, fettle beside its peers.

A transformer encoder of width 512 with 64 tokens, its weights drawn at random: speed does not depend on them. Every
system answers from numpy to numpy on one thread, in interleaved rounds; torchao runs in a process of its own, one
configuration after another, so its figures are less exact. "error" is ‖y − y_float‖ / ‖y_float‖ over 64 inputs. A
second table holds the trained encoder of `examples/encoder`: accuracy and agreement with float on its test signals.

Claimed: at each precision in each engine, fettle takes at most 1.05 times as long as the fastest peer of the same
precision in that engine and writes no larger a file; at each precision its fastest engine is faster than torchao's
torch.compile; and on the trained encoder 8 bits agree with float on at least 99 % of the signals.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import export_onnx, load_eager
from harness import ROOT, Claim, Options, Result, Table, Timing, finish, interleave, parse_options
from linear_encoder import FEATURES, OUTPUTS, TOKENS, build_encoder
from torch import nn
from weight_only_peers import Apart, System, build_peers, measure_torchao

from fettle.compress.capture import export_program
from fettle.compress.quantize.dynamic import Dynamic
from fettle.compress.quantize.weight_only import WeightOnly
from fettle.compress.step import Context, Step
from fettle.core import plugins
from fettle.core.artifact import Artifact, Manifest
from fettle.core.project import Project
from fettle.core.recipe import Recipe
from fettle.core.runner import RuntimeBase
from fettle.core.signature import Signature, TensorSpec
from fettle.runtime._device import exact_weight_bits

STEPS: dict[str, Step] = {
    "int8-weights": WeightOnly(bits=8),
    "int4-weights": WeightOnly(bits=4),
    "int8-dynamic": Dynamic(weight_bits=exact_weight_bits()),
}
ENGINES = ("onnxruntime", "openvino")
# torch's own kernels for weights in blocks are slower than float on a CPU; `runtime/_operations.py` says by how much.
COMPILED = {"int8-dynamic": ("inductor",)}
BATCHES = (1, 16)
ROWS = 64
MAX_RATIO = 1.05
# Two writers of the same weights differ by what they call their nodes.
MAX_SIZE_RATIO = 1.01
MIN_AGREEMENT = 0.99


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work a run does."""

    layers: int
    rounds: int
    turn_s: float


FULL = Effort(layers=4, rounds=12, turn_s=0.1)
QUICK = Effort(layers=1, rounds=5, turn_s=0.03)


@dataclass(frozen=True, slots=True)
class Row:
    """One system: `timings_ms` by batch size, the median over rounds; `size_bytes` is 0 where it writes no file."""

    name: str
    engine: str
    precision: str
    by: str
    size_bytes: int
    error: float
    timings: dict[int, Timing]


def main(options: Options) -> int:
    """Measure, judge, report."""
    torch.set_num_threads(1)
    effort = QUICK if options.quick else FULL
    missing: dict[str, str] = {}
    rows = measure_speed(effort, missing=missing)
    signals = measure_trained()
    result = Result(
        benchmark="weight_only",
        tables=(tabulate(rows, effort), tabulate_trained(signals)),
        claims=(claim_engines(rows), claim_torchao(rows), claim_agreement(signals)),
        details={"rows": [asdict(row) for row in rows], "trained": signals, "effort": asdict(effort)},
        missing=missing,
    )
    return finish(result, options)


def measure_speed(effort: Effort, *, missing: dict[str, str]) -> list[Row]:
    """Every system on the encoder with random weights."""
    model = build_encoder(effort.layers)
    tokens = np.random.default_rng(0).normal(size=(ROWS, TOKENS, FEATURES)).astype(np.float32)
    reference = load_eager(model)(tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "data.npz", x=tokens)
        example = (torch.from_numpy(tokens[:2]),)
        systems = build_peers(export_onnx(model, example, folder / "float.onnx"), folder, missing=missing)
        systems += build_fettle(model, example, folder)
        timings = [time_systems(systems, tokens[:batch], effort) for batch in BATCHES]
        rows = [
            Row(
                system.name,
                system.engine,
                system.precision,
                system.by,
                system.size_bytes,
                error_of(system.load(BATCHES[-1])(tokens[: BATCHES[-1]]), reference),
                dict(zip(BATCHES, times, strict=True)),
            )
            for system, *times in zip(systems, *timings, strict=True)
        ]
        apart, absent = measure_torchao(
            folder / "data.npz",
            folder,
            layers=effort.layers,
            batches=BATCHES,
            rounds=effort.rounds,
            turn_s=effort.turn_s,
        )
    missing.update(absent)
    return rows + [row_of(peer, reference) for peer in apart]


def build_fettle(model: nn.Module, example: tuple[torch.Tensor, ...], folder: Path) -> list[System]:
    """Each precision in each engine."""
    spec = TensorSpec(name="tokens", dtype="float32", shape=("batch", *example[0].shape[1:]))
    signature = Signature(
        inputs=(spec,), outputs=(TensorSpec(name="embedding", dtype="float32", shape=("batch", OUTPUTS)),)
    )
    systems = []
    for precision, step in STEPS.items():
        program = export_program(step.apply(model, Context(example=example)), example)
        for engine in (*ENGINES, *COMPILED.get(precision, ())):
            artifact = write(program, engine, folder / f"{precision}-{engine}", signature, precision)
            runner = artifact.load(threads=1)
            systems.append(
                System("fettle", engine, precision, lambda _, run=runner: run, artifact.size_bytes, by="fettle")
            )
    return systems


def write(program: Any, engine: str, root: Path, signature: Signature, precision: str) -> Artifact:
    """A sealed artifact, as `fettle optimize` makes them."""
    root.mkdir()
    plugins.load("fettle.runtime", engine, RuntimeBase)().export(program, root, signature)
    recipe = Recipe(name=precision)
    manifest = Manifest(runtime=engine, precision=precision, signature=signature, files=(), recipe=recipe)
    return Artifact.seal(root, manifest, golden={})


def time_systems(systems: list[System], tokens: Any, effort: Effort) -> list[Timing]:
    """Latency of each system on these tokens, interleaved."""
    calls = {}
    for number, system in enumerate(systems):
        predict = system.load(len(tokens))
        predict(tokens)  # compilation belongs to no round
        calls[f"{number}"] = lambda predict=predict: predict(tokens)
    return list(interleave(calls, rounds=effort.rounds, turn_s=effort.turn_s, warmup=1).values())


def row_of(peer: Apart, reference: Any) -> Row:
    """A peer that timed itself."""
    timings = {}
    for batch, rounds_ms in peer.rounds_ms.items():
        low, middle, high = np.quantile(rounds_ms, (0.25, 0.5, 0.75)).tolist()
        timings[batch] = Timing(middle, low, high, len(rounds_ms), len(rounds_ms))
    error = error_of(peer.outputs, reference)
    return Row(peer.name, "torch inductor", peer.precision, "peer", 0, error, timings)


def error_of(outputs: Any, reference: Any) -> float:
    """‖y − y_float‖ / ‖y_float‖ over the rows there are."""
    wanted = reference[: len(outputs)]
    return float(np.linalg.norm(outputs - wanted) / np.linalg.norm(wanted))


def measure_trained() -> list[dict[str, Any]]:
    """Accuracy and agreement with float of every precision on the trained encoder, as torch simulates it."""
    folder = ROOT / "examples" / "encoder"
    os.environ.setdefault("FETTLE_HOME", str(ROOT / ".fettle"))
    project = Project.open(folder / "fettle.toml")
    model = project.call("model.build", project.file.model.build)
    example = project.call("model.example", project.file.model.example)
    batches = list(project.call("data.test", project.file.data.test or ""))
    signals, classes = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        whole = model(signals)
        found = [{"precision": "float", "accuracy": float((whole.argmax(1) == classes).float().mean())}]
        for precision, step in STEPS.items():
            small = step.apply(model, Context(example=example))(signals)
            found.append(
                {
                    "precision": precision,
                    "accuracy": float((small.argmax(1) == classes).float().mean()),
                    "agreement": float((small.argmax(1) == whole.argmax(1)).float().mean()),
                    "error": error_of(small.numpy(), whole.numpy()),
                    "signals": len(classes),
                }
            )
    return found


def claim_engines(rows: list[Row]) -> Claim:
    """Ours beside the fastest peer of the same precision in the same engine."""
    statement = f"at most {MAX_RATIO} times the latency of the fastest peer of the same precision and engine, no larger"
    figures, holds = [], True
    for ours in (row for row in rows if row.by == "fettle"):
        peers = [row for row in rows if (row.by, row.engine, row.precision) == ("peer", ours.engine, ours.precision)]
        if not peers:
            continue
        ratios = [
            ours.timings[batch].median_ms / min(row.timings[batch].median_ms for row in peers) for batch in BATCHES
        ]
        size = ours.size_bytes / min(row.size_bytes for row in peers)
        holds &= max(ratios) <= MAX_RATIO and size <= MAX_SIZE_RATIO
        text = " / ".join(f"{ratio:.2f}" for ratio in ratios)
        figures.append(f"{ours.precision} in {ours.engine} {text} × at {size:.2f} × the size")
    return Claim(statement, holds=holds and bool(figures), figures=", ".join(figures) or "no peer was measured")


def claim_torchao(rows: list[Row]) -> Claim:
    """Our fastest engine beside torch.compile, precision by precision."""
    figures, holds = [], True
    for peer in (row for row in rows if row.engine == "torch inductor" and row.precision in STEPS):
        ours = [row for row in rows if row.by == "fettle" and row.precision == peer.precision]
        ratios = [
            min(row.timings[batch].median_ms for row in ours) / peer.timings[batch].median_ms for batch in BATCHES
        ]
        holds &= max(ratios) <= 1.0
        figures.append(f"{peer.precision} {' / '.join(f'{ratio:.2f}' for ratio in ratios)} × torchao")
    return Claim(
        "the fastest engine beats torchao",
        holds=holds and bool(figures),
        figures=", ".join(figures) or "torchao was not measured",
    )


def claim_agreement(signals: list[dict[str, Any]]) -> Claim:
    """8 bits on the trained encoder."""
    shares = {row["precision"]: row["agreement"] for row in signals if row["precision"].startswith("int8")}
    figures = ", ".join(f"{name} agrees on {share:.2%}" for name, share in shares.items())
    return Claim(
        f"8 bits agree with float on {MIN_AGREEMENT:.0%}",
        holds=min(shares.values()) >= MIN_AGREEMENT,
        figures=figures,
    )


def tabulate(rows: list[Row], effort: Effort) -> Table:
    """Peers first, then fettle, then torchao."""
    cells = tuple(
        (
            row.name,
            row.engine,
            row.precision,
            f"{row.size_bytes / 1e6:.2f}" if row.size_bytes else "–",
            f"{row.error:.4f}",
            *(f"{row.timings[batch].median_ms:.3f}" for batch in BATCHES),
        )
        for row in rows
    )
    latency = tuple(f"batch {batch}, ms" for batch in BATCHES)
    title = f"Transformer encoder, {effort.layers} layers of width 512, {TOKENS} tokens, one thread"
    return Table(title, ("system", "engine", "precision", "MB", "error", *latency), cells)


def tabulate_trained(signals: list[dict[str, Any]]) -> Table:
    """Accuracy on the trained encoder."""
    cells = tuple(
        (
            row["precision"],
            f"{row['accuracy']:.4f}",
            f"{row.get('agreement', 1.0):.4f}",
            f"{row.get('error', 0.0):.4f}",
        )
        for row in signals
    )
    return Table(
        "Trained encoder of width 64, 4096 test signals", ("precision", "accuracy", "agreement", "error"), cells
    )


if __name__ == "__main__":
    raise SystemExit(main(parse_options(__doc__)))
