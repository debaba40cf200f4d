"""Models that collapse when they are quantized naively: the default recovers them and names the layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.step import Context
from fettle.core.recipe import Budget
from fettle.pipeline import optimize

OUTLIERS = (0, 3)
FACTOR = 1000.0
CLASSES = 10


class Net(nn.Module):
    """Two convolutions, whose first writes a few channels a thousand times as large as the second needs them."""

    def __init__(self, activation):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 32, 3), nn.Linear(32, CLASSES)
        self.activation = activation

    def features(self, x):
        return torch.relu(self.body(self.activation(self.stem(x)))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def batches(seed, count):
    """Images of a class are noise around its pattern."""
    patterns = torch.randn(CLASSES, 3, 6, 6, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (100,), generator=generator)
        found.append((patterns[labels] + 0.3 * torch.randn(100, 3, 6, 6, generator=generator), labels))
    return found


def collapsing(activation):
    """A classifier fitted by least squares on random features, then scaled apart without changing what it computes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net(activation)
    x, labels = (torch.cat(parts) for parts in zip(*batches(1, 20), strict=True))
    with torch.no_grad():
        net.stem.weight[list(OUTLIERS)] *= FACTOR
        net.body.weight[:, list(OUTLIERS)] /= FACTOR
        features = net.features(x).double()
        center, spread = features.mean(dim=0), features.std(dim=0)
        targets = nn.functional.one_hot(labels, CLASSES).double()
        found = torch.linalg.lstsq((features - center) / spread, targets - targets.mean(dim=0)).solution.T
        net.head.weight.copy_(found / spread)
        net.head.bias.copy_(targets.mean(dim=0) - (found / spread) @ center)
    return net.eval()


def accuracy(model, data):
    with torch.no_grad():
        return float(np.mean([(model(x).argmax(1) == y).float().mean().item() for x, y in data]))


@pytest.mark.parametrize(
    ("activation", "cure"), [(nn.ReLU(), "equalization"), (nn.Hardswish(), "float")], ids=["relu", "hardswish"]
)
def test_the_default_recovers_and_names_the_layer(activation, cure, tmp_path):
    model = collapsing(activation)
    train, validation = batches(1, 4), batches(2, 5)
    naive = PostTraining(observer="min_max").apply(
        model, Context(example=(validation[0][0][:2],), calibration=[(x,) for x, _ in train])
    )
    original = accuracy(model, validation)
    assert original > 0.9
    assert accuracy(naive, validation) < original - 0.1, "a plain quantizer must lose more than ten points here"
    outcome = optimize(
        model,
        (validation[0][0][:2],),
        validation=validation,
        train=train,
        budget=Budget(max_drop=0.02),
        runtimes=("onnxruntime",),
        register=False,
        home=tmp_path,
    )
    kept = [
        each
        for each in outcome.candidates
        if each.precision == "int8" and each.report["metric.accuracy"].value >= original - 0.02
    ]
    assert kept, [f"{each.candidate.label} {each.report['metric.accuracy'].value}" for each in outcome.candidates]
    said = [*outcome.comparison.decisions, *(line.sentence() for line in outcome.comparison.layers)]
    if cure == "equalization":
        assert any("equalized (after stem" in sentence for sentence in said), said
    else:
        assert any(sentence.startswith("body was given back to float") for sentence in said), said
        (line,) = [line for line in outcome.comparison.layers if line.layer == "body"]
        assert line.spread > 100
        assert line.share > 0.5
        assert line.cost_ms is not None
