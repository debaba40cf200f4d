"""What every runtime must keep, as checks that raise AssertionError with a sentence.

from fettle.testing.runtimes import CHECKS

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_mine_conforms(check, tmp_path):
    check(MyRuntime(), tmp_path)
"""

from __future__ import annotations

import functools
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from fettle.compress.capture import export_program
from fettle.compress.quantize.dynamic import Dynamic
from fettle.compress.quantize.half import Half
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.quantize.weight_only import WeightOnly
from fettle.compress.step import Step
from fettle.core.artifact import MANIFEST, Artifact, Manifest
from fettle.core.errors import ArtifactError, CorruptArtifact
from fettle.core.recipe import Recipe
from fettle.core.runner import RuntimeBase
from fettle.core.signature import Array, Signature, TensorSpec
from fettle.testing.models import CASES, LARGE, Case
from fettle.testing.steps import answers, content, context_for

_MODELS = ("residual", "two_inputs", "two_outputs", "norm_first", "conv1d")
# What brings a model to a precision; one that is not here is not checked.
_STEPS: dict[str, Step] = {
    "int8": PostTraining(),
    "bf16": Half(),
    "fp16": Half(dtype="float16"),
    "int8-weights": WeightOnly(bits=8),
    "int4-weights": WeightOnly(bits=4),
    "int8-dynamic": Dynamic(),
}
_ROWS = (1, 2, 7, 1)
_TOLERANCE = 1e-4
_CALLERS = 4
_CALLS = 20


def signature_of(case: Case) -> Signature:
    """Inputs and outputs in an order that no sorting by name keeps."""
    found = answers(case.build(), case.data(rows=2))
    return Signature(
        inputs=tuple(
            TensorSpec(name=f"input_{9 - index}", dtype="float32", shape=("batch", *shape))
            for index, shape in enumerate(case.shapes)
        ),
        outputs=tuple(
            TensorSpec(name=f"output_{9 - index}", dtype="float32", shape=("batch", *tensor.shape[1:]))
            for index, tensor in enumerate(found)
        ),
    )


def named_data(case: Case, *, rows: int, seed: int = 0) -> dict[str, Array]:
    """One batch under the names of `signature_of`."""
    tensors = case.data(rows=rows, seed=seed)
    return {f"input_{9 - index}": tensor.numpy() for index, tensor in enumerate(tensors)}


def export_case(
    runtime: RuntimeBase, case: Case, folder: Path, *, model: torch.nn.Module | None = None, precision: str = "float"
) -> Signature:
    """Export the case's model, or the given one made from it, into a new folder; return the signature."""
    folder.mkdir(parents=True)
    signature = signature_of(case)
    model = model if model is not None else build(case, precision)
    runtime.export(export_program(model, case.data(rows=2)), folder, signature)
    return signature


@functools.cache
def _captured(
    case: Case, precision: str, weight_bits: int, again: bool = False
) -> tuple[torch.nn.Module, ExportedProgram]:
    """The case's model and its program, the same for every runtime, so made once; `again`: and once more."""
    model = build(case, precision, weight_bits=weight_bits)
    return model, export_program(model, case.data(rows=2))


def _export(
    runtime: RuntimeBase,
    case: Case,
    folder: Path,
    *,
    precision: str = "float",
    weight_bits: int = 8,
    again: bool = False,
) -> Signature:
    """As `export_case`, from the one program that the checks share, which must be left as it was."""
    folder.mkdir(parents=True)
    signature = signature_of(case)
    _, program = _captured(case, precision, weight_bits, again)
    before = content(program)
    runtime.export(program, folder, signature)
    assert content(program) == before, f"{case.name}: export must leave the program as it was"
    return signature


def build(case: Case, precision: str, *, weight_bits: int = 8) -> torch.nn.Module:
    """The case's model in that precision. weight_bits: at most, of weights that are multiplied in integers."""
    model = case.build()
    if precision == "float":
        return model
    step = _STEPS[precision]
    if isinstance(step, PostTraining | Dynamic):
        step = replace(step, weight_bits=weight_bits)
    return step.apply(model, context_for(case))


def seal(folder: Path, signature: Signature, *, precision: str = "float") -> Artifact:
    """The folder as an artifact."""
    recipe = Recipe(name=precision)
    manifest = Manifest(runtime="null", precision=precision, signature=signature, files=(), recipe=recipe)
    return Artifact.seal(folder, manifest, golden={})


def agrees_with_torch(runtime: RuntimeBase, folder: Path) -> None:
    """Float answers are those of torch within 1e-4, for one row and for several, on models of several kinds."""
    for case in (CASES[name] for name in _MODELS):
        signature = _export(runtime, case, folder / case.name)
        runner = runtime.load(seal(folder / case.name, signature), threads=1)
        for rows in _ROWS:
            expected = answers(case.build(), case.data(rows=rows, seed=rows))
            found = runner.run(named_data(case, rows=rows, seed=rows))
            names = [spec.name for spec in signature.outputs]
            assert list(found) == names, f"{case.name}: outputs must be {names} in this order, got {list(found)}"
            for spec, want in zip(signature.outputs, expected, strict=True):
                have = found[spec.name]
                assert (have.shape, have.dtype.name) == (tuple(want.shape), "float32"), (
                    f"{case.name}: {spec.name} must be float32 of shape {list(want.shape)}, "
                    f"got {have.dtype.name} {list(have.shape)}"
                )
                worst = float(np.abs(have - want.numpy()).max())
                if runtime.computes:
                    assert worst <= _TOLERANCE, f"{case.name}, {rows} rows: {spec.name} is off by {worst:.2g}"


def agrees_in_integers(runtime: RuntimeBase, folder: Path) -> None:
    """A quantized model answers as its simulation in torch does: a mean error below a twentieth of the spread."""
    precisions = sorted(runtime.precisions & set(_STEPS)) if runtime.computes else []
    # Steps that are for linear layers leave the small ones alone.
    wanted = {"int8": [CASES[name] for name in _MODELS]}
    plan = [(precision, case) for precision in precisions for case in wanted.get(precision, [LARGE["linear"]])]
    for precision, case in plan:
        bits = runtime.weight_bits()
        model, _ = _captured(case, precision, bits)
        parts = folder / f"{case.name}-{precision}"
        signature = _export(runtime, case, parts, precision=precision, weight_bits=bits)
        runner = runtime.load(seal(parts, signature, precision=precision), threads=1)
        for rows in (64, 1):
            expected = answers(model, case.data(rows=rows, seed=5))
            found = runner.run(named_data(case, rows=rows, seed=5))
            spread = [tensor.std().item() for tensor in answers(model, case.data(rows=64, seed=5))]
            for spec, want, scale in zip(signature.outputs, expected, spread, strict=True):
                error = float(np.abs(found[spec.name] - want.numpy()).mean()) / scale
                where = f"{case.name} in {precision}, {rows} rows"
                assert error < 0.05, f"{where}: {spec.name} is off by {error:.1%} of its spread"


def answers_several_threads(runtime: RuntimeBase, folder: Path) -> None:
    """Calls from several threads at once, of several sizes, give what one thread gets; old answers stay as they are."""
    case = CASES["two_outputs"]
    signature = _export(runtime, case, folder / "model")
    artifact = seal(folder / "model", signature)
    for threads in (1, 2):
        runner = runtime.load(artifact, threads=threads)
        batches = [named_data(case, rows=1 + index % 5, seed=index) for index in range(_CALLS)]
        before = [{name: array.copy() for name, array in batch.items()} for batch in batches]
        alone, kept = [], []
        for batch in batches:
            alone.append(runner.run(batch))
            # Copied before the next call, which must not be able to change what is compared.
            kept.append({name: array.copy() for name, array in alone[-1].items()})
        _same(alone, kept, "an answer must not change when the next one is computed")
        with ThreadPoolExecutor(_CALLERS) as pool:
            together = list(pool.map(runner.run, batches * _CALLERS))
        for index, found in enumerate(together):
            for name, want in kept[index % _CALLS].items():
                assert np.allclose(found[name], want, atol=1e-6), f"{name} must be the same from several threads"
        _same(alone, kept, "an answer must not change when others are computed at the same time")
        _same(batches, before, "inputs must be left as they were")


def takes_views(runtime: RuntimeBase, folder: Path) -> None:
    """Inputs that are no contiguous arrays, read-only, or from `Runner.empty`, are answered like any other."""
    case = CASES["mlp"]
    runner = runtime.load(seal(folder / "model", _export(runtime, case, folder / "model")), threads=1)
    whole = named_data(case, rows=8)["input_9"]
    frozen = whole.copy()
    frozen.setflags(write=False)
    own = runner.empty("input_9", whole.shape)
    own[...] = whole
    views = [(whole[::2], whole[::2].copy()), (np.asfortranarray(whole), whole), (frozen, whole)]
    for view, plain in (*views, (own, whole), (own[3:], whole[3:])):
        found, want = runner.run({"input_9": view}), runner.run({"input_9": plain})
        assert np.allclose(found["output_9"], want["output_9"], atol=1e-6), "a view must be answered as its copy is"


def writes_the_same_twice(runtime: RuntimeBase, folder: Path) -> None:
    """The same program gives the same bytes, so that the same work has the same digest."""
    plan = [("float", CASES["residual"]), ("float", CASES["norm_first"])]
    plan += [(precision, CASES["residual"]) for precision in ("int8",) if precision in runtime.precisions]
    for precision, case in plan:
        parts = folder / f"{case.name}-{precision}"
        # Built and captured each time too, though not for each runtime.
        for name, anew in (("first", False), ("second", True)):
            _export(runtime, case, parts / name, precision=precision, again=anew)
        for path in files(parts / "first"):
            again = (parts / "second" / path.name).read_bytes()
            assert path.read_bytes() == again, f"{case.name} in {precision}: {path.name} must be the same each time"


def writes_no_source(runtime: RuntimeBase, folder: Path) -> None:
    """Nothing about the code the model was written in: it is private, and other on every machine."""
    # Captured anew: an earlier export may have cleared what was noted in a shared program.
    export_case(runtime, CASES["residual"], folder / "model")
    for path in files(folder / "model"):
        content = path.read_bytes()
        for trace in (__file__.encode(), b"models.py", b"stack_trace", b"fettle.testing"):
            assert trace not in content, f"{path.name} must not hold {trace!r}"


def writes_no_pickle(runtime: RuntimeBase, folder: Path) -> None:
    """A file that unpickling could be tried on is no model file."""
    _export(runtime, CASES["mlp"], folder / "model")
    for path in files(folder / "model"):
        start = path.read_bytes()[:4]
        assert start[:1] != b"\x80", f"{path.name} must be no pickle"
        assert start != b"PK\x03\x04", f"{path.name} must be no archive of pickles"


def refuses_altered_files(runtime: RuntimeBase, folder: Path) -> None:
    """A file changed after sealing is caught by its hash, before the engine sees it."""
    signature = _export(runtime, CASES["mlp"], folder / "model")
    seal(folder / "model", signature)
    for path in files(folder / "model"):
        whole = path.read_bytes()
        for what, changed in damaged(whole):
            path.write_bytes(changed)
            problem = _problem(lambda: Artifact.open(folder / "model"))
            assert isinstance(problem, CorruptArtifact), f"{path.name} {what} must be CorruptArtifact, got {problem!r}"
        path.unlink()
        problem = _problem(lambda: Artifact.open(folder / "model"))
        assert isinstance(problem, CorruptArtifact), f"{path.name} missing must be CorruptArtifact, got {problem!r}"
        path.write_bytes(whole)


def refuses_foreign_files(runtime: RuntimeBase, folder: Path) -> None:
    """A file that was wrong before it was sealed is the engine's to refuse: ArtifactError, and nothing is executed."""
    signature = _export(runtime, CASES["mlp"], folder / "model")
    for number, (what, change) in enumerate(_FOREIGN.items()):
        parts = folder / f"model-{number}"
        shutil.copytree(folder / "model", parts)
        witness = parts.parent / f"executed-{number}"
        for path in files(parts):
            whole = path.read_bytes()
            path.write_bytes(change(whole, witness))
            (parts / MANIFEST).unlink(missing_ok=True)
            artifact = seal(parts, signature)
            problem = _problem(lambda: runtime.load(artifact, threads=1))  # noqa: B023
            assert isinstance(problem, ArtifactError), f"{path.name} {what} must be an ArtifactError, got {problem!r}"
            assert not witness.exists(), f"{path.name} {what} must not be executed"
            path.write_bytes(whole)


CHECKS: tuple[Callable[[RuntimeBase, Path], None], ...] = (
    agrees_with_torch,
    agrees_in_integers,
    answers_several_threads,
    takes_views,
    writes_the_same_twice,
    writes_no_source,
    writes_no_pickle,
    refuses_altered_files,
    refuses_foreign_files,
)


class _Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


_FOREIGN: dict[str, Callable[[bytes, Path], bytes]] = {
    "empty": lambda whole, witness: b"",
    "cut in half": lambda whole, witness: whole[: len(whole) // 2],
    "replaced by text": lambda whole, witness: b"not a model at all\n" * 20,
    "replaced by a pickle": lambda whole, witness: pickle.dumps(_Touch(witness)),
}


def damaged(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """The content cut, lengthened, and with single bits flipped at the start, in the middle and at the end.

    >>> [what for what, _ in damaged(b"model")]
    ['cut short', 'lengthened', 'with bit 0 flipped', 'with bit 16 flipped', 'with bit 39 flipped']
    """
    yield "cut short", whole[:-1]
    yield "lengthened", whole + b"\x00"
    for bit in (0, 8 * (len(whole) // 2), 8 * len(whole) - 1):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"with bit {bit} flipped", bytes(changed)


def files(folder: Path) -> list[Path]:
    """What a runtime wrote, without what sealing adds."""
    return sorted(path for path in folder.iterdir() if path.name not in (MANIFEST, "golden.safetensors"))


def _problem(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as problem:
        return problem
    return None


def _same(left: list[dict[str, Array]], right: list[dict[str, Array]], rule: str) -> None:
    for one, other in zip(left, right, strict=True):
        for name, array in other.items():
            assert np.array_equal(one[name], array), rule
