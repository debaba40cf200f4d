"""What may answer: an artifact that loads, fits its signature, and gives its golden outputs."""

import dataclasses
import pickle

import numpy as np
import pytest
import safetensors.numpy

from fettle.core.artifact import Artifact, parse_manifest
from fettle.core.errors import ArtifactError, CorruptArtifact
from fettle.core.runner import Runner
from fettle.core.signature import ImagePreprocess, Signature, TensorSpec
from fettle.serve import model as model_module
from fettle.serve.model import LoadedModel, check_golden, check_image, is_classifier, is_row_wise, load_model


def load(artifact):
    return load_model("tiny", 3, artifact, threads=1, max_batch_rows=8)[0]


def spec(name, dtype, *shape):
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def test_a_good_artifact(kit, tmp_path):
    artifact = kit.image_artifact(tmp_path / "a")
    model = load(artifact)
    assert (model.name, model.version, model.digest) == ("tiny", 3, artifact.digest)
    assert model.row_wise
    assert model.classifies


@pytest.mark.parametrize("change", ["value", "nan", "rows", "missing output", "missing input", "other name"])
def test_golden_mismatch_is_refused(kit, tmp_path, change):
    def spoil(golden):
        if change == "value":
            golden["output:logits"] = golden["output:logits"] + 0.01
        elif change == "nan":
            golden["output:logits"] = golden["output:logits"] * np.nan
        elif change == "rows":
            golden["output:logits"] = golden["output:logits"][:2]
        elif change == "missing output":
            del golden["output:logits"]
        elif change == "missing input":
            del golden["input:x"]
        else:
            golden["input:y"] = golden.pop("input:x")

    with pytest.raises(ArtifactError, match="golden"):
        load(kit.image_artifact(tmp_path / "a", spoil=spoil))


@pytest.mark.parametrize(
    ("precision", "overflows", "told"), [("int8", True, True), ("int8", False, False), ("float", True, False)]
)
def test_a_cpu_whose_int8_kernels_overflow_is_named_as_a_cause(monkeypatch, precision, overflows, told):
    monkeypatch.setattr(model_module, "adds_products_in_16_bits", lambda: overflows)

    class Other(Runner):
        def run(self, inputs):
            return {"y": inputs["x"] + 1}

    signature = Signature(inputs=(spec("x", "float32", "batch", 2),), outputs=(spec("y", "float32", "batch", 2),))
    loaded = LoadedModel(
        name="m",
        version=1,
        digest="d",
        runtime="null",
        precision=precision,
        signature=signature,
        runner=Other(signature),
        row_wise=True,
        classifies=False,
    )
    golden = {"input:x": np.zeros((2, 2), np.float32), "output:y": np.zeros((2, 2), np.float32)}
    with pytest.raises(ArtifactError, match="as it did where it was measured") as caught:
        check_golden(loaded, golden, tolerance=0.1)
    assert ("on a CPU with VNNI" in str(caught.value)) is told


def test_within_tolerance_is_good(kit, tmp_path):
    def spoil(golden):
        golden["output:logits"] = golden["output:logits"] + np.float32(5e-5)

    load(kit.image_artifact(tmp_path / "a", spoil=spoil))


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_bit_is_refused_before_parsing(kit, tmp_path, place):
    kit.image_artifact(tmp_path / "a")
    path = tmp_path / "a" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match="SHA-256"):
        Artifact.open(tmp_path / "a")


def test_a_truncated_file_is_refused(kit, tmp_path):
    kit.image_artifact(tmp_path / "a")
    path = tmp_path / "a" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match="bytes"):
        Artifact.open(tmp_path / "a")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def reseal(root, **changes):
    """Seal the folder again as a forger would: with hashes that are right."""
    golden = safetensors.numpy.load_file(root / "golden.safetensors")
    manifest = dataclasses.replace(parse_manifest((root / "manifest.json").read_bytes()), **changes)
    (root / "golden.safetensors").unlink()
    return Artifact.seal(root, manifest, golden=golden)


def test_a_pickle_in_place_of_the_model_is_never_loaded(kit, tmp_path):
    root = tmp_path / "a"
    kit.image_artifact(root)
    (root / "model.onnx").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CorruptArtifact, match="refuses"):
        load(reseal(root))


@pytest.mark.parametrize("place", ["inputs", "outputs"])
@pytest.mark.parametrize("what", ["name", "dtype", "shape"])
def test_a_signature_that_lies_is_refused(kit, tmp_path, place, what):
    root = tmp_path / "a"
    signature = kit.image_artifact(root).manifest.signature
    (old,) = getattr(signature, place)
    other = {"name": "other", "dtype": "float64", "shape": (*old.shape[:-1], 9)}[what]
    if (place, what) == ("outputs", "shape"):
        other = (*old.shape, 1)
    changed = dataclasses.replace(signature, image=None, **{place: (dataclasses.replace(old, **{what: other}),)})
    with pytest.raises(Exception, match=r".") as caught:
        load(reseal(root, signature=changed))
    assert not isinstance(caught.value, (AssertionError, KeyError, IndexError))


@pytest.mark.parametrize(
    ("inputs", "outputs", "row_wise"),
    [
        ([("batch", 3)], [("batch", 2)], True),
        ([("batch", "n"), ("batch",)], [("batch", "n", 2)], True),
        ([(1, 3)], [(1, 2)], False),
        ([("batch", 3)], [("rows", 2)], False),
        ([("batch", 3), ("other", 3)], [("batch", 2)], False),
        ([("batch", 3)], [()], False),
        ([("batch", 3)], [("batch", 2), (4,)], False),
    ],
)
def test_row_wise(inputs, outputs, row_wise):
    signature = Signature(
        inputs=tuple(spec(f"i{n}", "float32", *shape) for n, shape in enumerate(inputs)),
        outputs=tuple(spec(f"o{n}", "float32", *shape) for n, shape in enumerate(outputs)),
    )
    assert is_row_wise(signature) is row_wise


@pytest.mark.parametrize(
    ("dtype", "shape", "classifies"),
    [
        ("float32", ("batch", 3), True), ("float16", ("batch", "n"), True), ("int64", ("batch", 3), False),
        ("float32", ("batch",), False), ("float32", ("batch", 3, 4), False), ("float32", (2, 3), False),
    ],
)  # fmt: skip
def test_classifies(dtype, shape, classifies):
    signature = Signature(inputs=(spec("x", "float32", "batch", 2),), outputs=(spec("y", dtype, *shape),))
    assert is_classifier(signature) is classifies


@pytest.mark.parametrize(
    ("inputs", "fits"),
    [
        ([("float32", ("batch", 3, 8, 8))], True), ([("float32", ("batch", 3, "h", "w"))], True),
        ([("float32", ("batch", 1, 8, 8))], False), ([("float32", ("batch", 8, 8, 3))], False),
        ([("uint8", ("batch", 3, 8, 8))], False), ([("float32", (1, 3, 8, 8))], False),
        ([("float32", ("batch", 192))], False), ([("float32", ("batch", 3, 8, 8)), ("float32", ("batch", 2))], False),
    ],
)  # fmt: skip
def test_declared_images_must_fit_the_input(inputs, fits):
    image = ImagePreprocess(resize=8, crop=8)
    signature = Signature(
        inputs=tuple(spec(f"x{n}", dtype, *shape) for n, (dtype, shape) in enumerate(inputs)),
        outputs=(spec("y", "float32", "batch", 3),),
        image=image,
    )
    if fits:
        check_image(signature)
    else:
        with pytest.raises(ArtifactError, match="preprocessing"):
            check_image(signature)
