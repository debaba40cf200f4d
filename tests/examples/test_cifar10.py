import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from fettle.core.project import Project

ModuleOf = Callable[[str, str], ModuleType]
# Parameters, and accuracy on the first 500 validation images.
PROJECTS = {
    "cifar10/fettle.toml": (269_722, 0.8760),
    "cifar10/resnet56.toml": (853_018, 0.8980),
    "cifar10/depthwise.toml": (108_706, 0.8240),
    "cifar10/squeeze.toml": (80_870, 0.7980),
}
SMALL = {"depthwise.toml": 14e6, "squeeze.toml": 13e6}


@pytest.fixture
def data(module_of: ModuleOf) -> ModuleType:
    return module_of("cifar10", "data")


@pytest.fixture
def folder(data: ModuleType) -> Path:
    """The real data, or a skip."""
    try:
        return data.data_folder()  # type: ignore[no-any-return]
    except FileNotFoundError as problem:
        pytest.skip(str(problem))


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def small(tmp_path: Path, pixels: np.ndarray) -> Path:
    """Seven images as PNG, which loses nothing: the decoder does not care."""
    encoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    table = pa.table({"image": encoded, "label": list(range(7)), "name": ["x"] * 7})
    pq.write_table(table, tmp_path / "small.parquet", row_group_size=3)
    return tmp_path / "small.parquet"


@pytest.fixture
def trainer(open_example: Callable[[str], Project]) -> Iterator[ModuleType]:
    """`train.py`; what it imports besides `model` and `data` is forgotten afterwards, as those are."""
    open_example("cifar10").resolve("train", "train:train")
    yield sys.modules["train"]
    for name in ("train", "depthwise", "squeeze"):
        sys.modules.pop(name, None)


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("file", PROJECTS)
def test_the_weights_load_strictly_and_reach_their_accuracy(
    open_example: Callable[[str], Project], folder: Path, file: str
) -> None:
    project = open_example(file)
    parameters, accuracy = PROJECTS[file]
    model = project.call("model.build", project.file.model.build)
    (example,) = project.call("model.example", project.file.model.example)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert not model.training
    hits = count = 0
    with torch.inference_mode():
        assert model(example).shape == (2, 10)
        for images, labels in project.call("data.validation", project.file.data.validation):
            images, labels = images[: 500 - count], labels[: 500 - count]
            hits += int((model(images).argmax(dim=1) == labels).sum())
            count += len(labels)
            if count == 500:
                break
    assert hits / count == pytest.approx(accuracy, abs=0.004)


@pytest.mark.parametrize(("split", "images"), [("train", 2048), ("validation", 2000), ("test", 5000)])
def test_every_split_has_its_size(data: ModuleType, folder: Path, split: str, images: int) -> None:
    batches = getattr(data, split)()
    sizes = [len(labels) for _, labels in batches]
    assert sum(sizes) == images
    assert len(batches) == len(sizes)


def test_training_images_are_decoded_as_they_are_read(
    data: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda jpeg: (decoded.append(jpeg), decode(jpeg))[1])
    images, labels = next(iter(data.train_all()))
    assert images.shape == (128, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert len(decoded) == 128


def test_images_are_normalized_as_the_project_file_declares(
    data: ModuleType, open_example: Callable[[str], Project], small: Path, pixels: np.ndarray
) -> None:
    image = open_example("cifar10").file.preprocess.image
    assert image is not None
    ((images, labels),) = list(data.Batches(small, limit=100))
    for row in range(7):
        for channel in range(3):
            wanted = (pixels[row, :, :, channel] / 255 - image.mean[channel]) / image.std[channel]
            np.testing.assert_allclose(images[row, channel].numpy(), wanted, atol=1e-5)
    assert labels.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("limit", "size", "wanted"),
    [(100, 7, [7]), (100, 3, [3, 3, 1]), (5, 3, [3, 2]), (6, 3, [3, 3]), (1, 3, [1]), (0, 3, [])],
)
def test_batches_stop_at_the_limit(data: ModuleType, small: Path, limit: int, size: int, wanted: list[int]) -> None:
    batches = data.Batches(small, limit=limit, size=size)
    for _ in range(2):
        assert [len(labels) for _, labels in batches] == wanted
    assert len(batches) == len(wanted)


def test_a_missing_folder_is_named_with_what_it_lacks(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FETTLE_DATA", str(tmp_path))
    (tmp_path / "train.parquet").touch()
    with pytest.raises(FileNotFoundError, match=r"needs validation\.parquet, .* in .*: set FETTLE_DATA"):
        data.validation()


@pytest.mark.parametrize(("blocks", "layers"), [(3, 20), (9, 56)])
def test_the_networks_have_the_depth_of_their_names(module_of: ModuleOf, blocks: int, layers: int) -> None:
    model = module_of("cifar10", "model").ResNet(blocks)
    weighted = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    activations = [module for module in model.modules() if isinstance(module, torch.nn.ReLU)]
    assert len(weighted) == layers
    assert len(activations) == 1


def test_the_shortcut_subsamples_and_pads_half_before_and_half_after(module_of: ModuleOf) -> None:
    block = module_of("cifar10", "model").Block(16, 32, relu=torch.nn.ReLU())
    features = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(2, 32, 4, 4)
    for row in range(4):
        for column in range(4):
            wanted[:, 8:24, row, column] = features[:, :, 2 * row, 2 * column]
    assert torch.equal(block.shortcut(features), wanted)


def test_weights_with_other_names_are_refused(module_of: ModuleOf, tmp_path: Path) -> None:
    model = module_of("cifar10", "model")
    weights = model.ResNet(3).state_dict()
    weights["surplus"] = torch.zeros(1)
    safetensors.torch.save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError, match="surplus"):
        model.load(model.ResNet(3), tmp_path / "other.safetensors")


@pytest.mark.parametrize("file", SMALL)
def test_the_small_networks_are_small_and_come_with_their_weights(
    open_example: Callable[[str], Project], trainer: ModuleType, file: str
) -> None:
    project = open_example(f"cifar10/{file}")
    model = project.call("model.build", project.file.model.build)
    weights = project.path.parent / "weights" / f"{project.path.stem}.safetensors"
    assert weights.stat().st_size < 800_000
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert counter.get_total_flops() / 2 < SMALL[file]
    assert not model.training


@pytest.mark.parametrize("name", ["depthwise", "squeeze"])
def test_the_batch_size_is_free_when_exported(trainer: ModuleType, seeded: None, name: str) -> None:
    model = trainer.PLANS[name].build().eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
        images = torch.randn(5, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), model(images))


def test_a_bottleneck_adds_its_input_only_where_shapes_agree(trainer: ModuleType, seeded: None) -> None:
    features = torch.randn(2, 8, 6, 6)
    for outputs, stride, adds in ((8, 1, True), (8, 2, False), (12, 1, False)):
        block = trainer.depthwise.Bottleneck(8, outputs, expansion=3, stride=stride).eval()
        wanted = block.residual(features) + (features if adds else 0)
        torch.testing.assert_close(block(features), wanted)
        filters = [module for module in block.modules() if isinstance(module, torch.nn.Conv2d) and module.groups > 1]
        assert [module.groups for module in filters] == [24]


def test_a_gate_scales_each_channel_by_one_number(trainer: ModuleType, seeded: None) -> None:
    gate = trainer.squeeze.Gate(8)
    features = torch.rand(3, 8, 5, 5) + 0.5
    with torch.inference_mode():
        scale = gate(features) / features
    assert scale.shape == (3, 8, 5, 5)
    assert torch.allclose(scale, scale[:, :, :1, :1])
    assert 0 < float(scale.min()) < float(scale.max()) < 1


def test_an_augmented_image_is_a_crop_of_the_padded_one_mirrored_or_not(
    trainer: ModuleType, pixels: np.ndarray, seeded: None
) -> None:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    found: set[tuple[int, int, bool]] = set()
    for _ in range(20):
        for row, moved in enumerate(trainer.augment(images).numpy()):
            places = [
                (top, left, mirrored)
                for top in range(9)
                for left in range(9)
                for mirrored in (False, True)
                if np.array_equal(
                    moved, padded[row, :, top : top + 32, left : left + 32][:, :, :: -1 if mirrored else 1]
                )
            ]
            assert len(places) == 1
            found.update(places)
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(9))
    assert {mirrored for _, _, mirrored in found} == {False, True}


def test_training_sees_the_pixels_that_evaluation_sees(
    trainer: ModuleType, data: ModuleType, small: Path, pixels: np.ndarray
) -> None:
    images, labels = trainer.load_pixels(small)
    assert (images.dtype, images.shape, labels.tolist()) == (torch.uint8, (7, 3, 32, 32), list(range(7)))
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    ((wanted, _),) = list(data.Batches(small, limit=7))
    torch.testing.assert_close(trainer.normalize(images), wanted)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_is_the_same_under_one_seed_and_learns(
    trainer: ModuleType, monkeypatch: pytest.MonkeyPatch, bfloat16: bool
) -> None:
    monkeypatch.setattr(trainer, "BATCH", 32)
    labels = torch.arange(64) % 2
    images = (labels[:, None, None, None] * 200).to(torch.uint8).expand(64, 3, 32, 32)

    def losses() -> list[float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            tiny = torch.nn.Sequential(
                torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(2)
            )
            tiny(torch.zeros(1, 3, 32, 32))
            return list(trainer.train(tiny, images, labels, epochs=5, bfloat16=bfloat16))

    first = losses()
    assert first == losses()
    assert first[-1] < first[0] / 2


def test_a_run_writes_weights_that_load(
    trainer: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    seeded: None,
) -> None:
    plan = trainer.Plan(trainer.squeeze.SqueezeNet, epochs=1, bfloat16=False)
    monkeypatch.setattr(trainer, "PLANS", {"squeeze": plan})
    monkeypatch.setattr(trainer, "data_folder", lambda: tmp_path)
    monkeypatch.setattr(trainer, "load_pixels", lambda path: (torch.zeros(8, 3, 32, 32).byte(), torch.arange(8)))
    monkeypatch.setattr(trainer, "validation", lambda: [(torch.zeros(4, 3, 32, 32), torch.full((4,), 10))])
    monkeypatch.setattr(
        sys, "argv", ["train.py", "squeeze", "--output", str(tmp_path / "deep" / "squeeze.safetensors")]
    )
    threads = torch.get_num_threads()
    try:
        trainer.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "epoch 1  loss 2." in printed
    assert "accuracy on validation 0.0000" in printed
    trainer.squeeze.load(trainer.squeeze.SqueezeNet(), tmp_path / "deep" / "squeeze.safetensors")
