"""Which observer the ranges come from: the one whose rounding validation rows mind least."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fettle.compress.capture import capture
from fettle.compress.quantize.post_training import PostTraining
from fettle.core.recipe import Budget
from fettle.stages import ranges
from fettle.stages.judge import Judge
from fettle.stages.ranges import choose_observer
from fettle.stages.task import Sources, make_task


def task_for(model, train, validation):
    def labelled(rows):
        with torch.no_grad():
            return [(rows, model(rows).argmax(dim=1))]

    return make_task(
        model,
        (train[:2],),
        Sources(validation=labelled(validation), train=labelled(train)),
        metric="accuracy",
        classes=(),
        image=None,
        name="m",
        budget=Budget(),
        seed=0,
        threads=1,
        batch=1,
        progress=lambda *_: None,
    )


@pytest.fixture
def task(generator):
    """One wild calibration row in twenty thousand, and none on validation: its values should be cut off."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    train = torch.randn(20_000, 8, generator=generator)
    train[0] *= 200.0
    return task_for(model, train, torch.randn(400, 8, generator=generator))


def choose(task, base, *, proceed=lambda: True):
    return choose_observer(task, Judge(task), capture(task.model, task.example), base, proceed=proceed)


def test_the_nearer_one_is_kept_and_told(task):
    found, (sentence,) = choose(task, PostTraining(observer="min_max", weight_bits=2))
    assert found == PostTraining(observer="percentile", weight_bits=2)
    assert sentence.startswith("ranges by percentile: kept, divergence from float with weights unrounded ")


def test_one_that_is_no_nearer_is_left_out(task, monkeypatch):
    monkeypatch.setattr(ranges, "_OTHERS", ("min_max", "percentile"))
    base = PostTraining(observer="percentile")
    found, sentences = choose(task, base)
    assert found == base
    assert [sentence.partition(",")[0] for sentence in sentences] == ["ranges by min max: tried and left out"]


def test_without_time_none_is_tried(task):
    base = PostTraining()
    found, sentences = choose(task, base, proceed=lambda: False)
    assert (found, sentences) == (base, ["ranges by percentile: not tried, the time limit was near"])
