from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fettle.core.project import Project


@pytest.fixture
def model(module_of: Callable[[str, str], ModuleType]) -> ModuleType:
    return module_of("encoder", "model")


@pytest.fixture
def data(module_of: Callable[[str, str], ModuleType]) -> ModuleType:
    return module_of("encoder", "data")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_is_the_same_each_time(data: ModuleType, split: str) -> None:
    signals = getattr(data, split)()
    first, again = next(iter(signals)), next(iter(signals))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert len(list(signals)) == len(signals)
    assert first[0].shape == (128, 24, 16)
    assert (first[0].dtype, first[1].dtype) == (torch.float32, torch.int64)


def test_the_splits_share_no_signal(data: ModuleType) -> None:
    firsts = [next(iter(split()))[0] for split in (data.train, data.validation, data.test)]
    assert len({tuple(row.flatten().tolist()) for batch in firsts for row in batch}) == 3 * 128


def test_the_motifs_are_orthogonal(data: ModuleType) -> None:
    motifs = data.motifs()
    torch.testing.assert_close(motifs @ motifs.T / data.WIDTH, torch.eye(data.MOTIFS))


def test_a_class_is_two_motifs_in_order(data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "AMPLITUDE", 100.0)  # far above the noise, so that the motifs can be read off
    signals, classes = data.draw(64, torch.Generator().manual_seed(5))
    for signal, index in zip(signals, classes.tolist(), strict=True):
        strength = signal @ data.motifs().T / data.WIDTH
        frames = [frame for frame in range(data.FRAMES) if strength[frame].max() > 50]
        found = [int(strength[frame].argmax()) for frame in frames]
        assert found == data.ORDERS[index].tolist()


def test_the_class_names_follow_the_orders(open_example: Callable[[str], Project], data: ModuleType) -> None:
    wanted = [f"{'abcd'[first]}-{'abcd'[second]}" for first, second in data.ORDERS.tolist()]
    assert list(open_example("encoder").file.task.classes) == wanted


def test_training_is_deterministic_and_leaves_the_global_generator_alone(model: ModuleType) -> None:
    before = torch.random.get_rng_state()
    first, again = (model.train(steps=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_learns(model: ModuleType, data: ModuleType) -> None:
    signals, classes = data.draw(512, torch.Generator().manual_seed(9))
    losses = []
    for steps in (1, 120):
        encoder = model.train(steps=steps)
        with torch.inference_mode():
            losses.append(float(torch.nn.functional.cross_entropy(encoder(signals), classes)))
    assert losses[1] < losses[0] - 0.3


def test_build_trains_once_and_keeps_the_weights(
    model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FETTLE_HOME", str(tmp_path))
    trainings: list[torch.nn.Module] = []
    monkeypatch.setattr(model, "train", lambda: trainings.append(model.Encoder()) or trainings[-1])
    first, again = model.build(), model.build()
    assert len(trainings) == 1
    assert not again.training
    assert [path.name for path in (tmp_path / "examples").iterdir()] == [model.weights_path().name]
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.slow
def test_the_trained_encoder_is_good_but_not_perfect(open_example: Callable[[str], Project], model: ModuleType) -> None:
    if not model.weights_path().is_file():
        pytest.skip("the encoder is not trained yet: its first build() takes half a minute")
    project = open_example("encoder")
    trained = project.call("model.build", project.file.model.build)
    with torch.inference_mode():
        hits = [(trained(x).argmax(dim=1) == y).float().mean() for x, y in project.call("data", "data:validation")]
    assert 0.90 < float(torch.stack(hits).mean()) < 0.98


def test_the_batch_size_is_free_when_exported(model: ModuleType) -> None:
    encoder = model.Encoder().eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(encoder, model.example(), dynamic_shapes=({0: batch},))
        signals = torch.randn(5, 24, 16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(program.module()(signals), encoder(signals))
