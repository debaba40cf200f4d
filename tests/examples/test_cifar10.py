import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from fettle.core.project import Project

ModuleOf = Callable[[str, str], ModuleType]
PROJECTS = {"cifar10/fettle.toml": (269_722, 0.8760), "cifar10/resnet56.toml": (853_018, 0.8980)}


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
