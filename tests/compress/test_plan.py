from __future__ import annotations

import math

import pytest
import torch

from fettle.compress.plan import Group, Plan, choose_device, forward_precision, make_optimizer
from fettle.core.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay must be zero or a positive number, got -0.1"),
        ({"optimizer": "adam"}, 'optimizer must be "adamw" or "sgd", got \'adam\''),
        ({"precision": "int8"}, "precision must be"),
    ],
)
def test_a_plan_that_cannot_mean_anything_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Plan(**{"epochs": 1, "learning_rate": 0.1, **options})


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_rate_is_half_a_cosine(share):
    wanted = 0.3 * (1 + math.cos(math.pi * share)) / 2
    assert Plan(epochs=1, learning_rate=0.3).rate(share) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_and_pace_are_those_of_the_group(optimizer):
    groups = [Group(tensors=[torch.ones(2)], decay=True), Group(tensors=[torch.ones(1)], pace=0.5)]
    made = make_optimizer(Plan(epochs=1, learning_rate=0.1, weight_decay=0.01, optimizer=optimizer), groups)
    assert [group["weight_decay"] for group in made.param_groups] == [0.01, 0.0]
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.05]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_precision_that_was_asked_for_is_taken(precision):
    assert forward_precision(precision, torch.device("cpu")) is getattr(torch, precision)


def test_a_cpu_computes_in_float32_by_itself():
    assert forward_precision("auto", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta", "mps"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(UsageError, match="device must be"):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda:99", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_missing_gpu_is_refused(name):
    with pytest.raises(UsageError, match=f'"{name}" was asked for, and this machine has'):
        choose_device(name)


def test_auto_takes_a_gpu_where_there_is_one():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
