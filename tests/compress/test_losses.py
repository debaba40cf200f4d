from __future__ import annotations

import math

import pytest
import torch

from fettle.compress.losses import label_loss, outputs_of, teacher_loss
from fettle.core.errors import DataError


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def rows_of(logits, axis):
    """Each place's logits as a list."""
    return logits.movedim(axis, -1).reshape(-1, logits.shape[axis]).tolist()


LAYOUTS = {
    "rows": ((5, 3), (5,), 1),
    "classes second": ((4, 3, 6), (4, 6), 1),
    "classes last": ((4, 6, 3), (4, 6), -1),
    "images": ((2, 3, 4, 5), (2, 4, 5), 1),
    "one row": ((1, 3), (1,), 1),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_give_the_mean_of_minus_log_probability(layout, dtype, generator):
    shape, places, axis = LAYOUTS[layout]
    logits = torch.randn(shape, generator=generator)
    targets = torch.randint(3, places, generator=generator).to(dtype)
    pairs = zip(rows_of(logits, axis), targets.flatten().tolist(), strict=True)
    wanted = [-math.log(softmax(row)[label]) for row, label in pairs]
    assert float(label_loss(logits, targets)) == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teacher_gives_the_mean_divergence(layout, generator):
    shape, places, axis = LAYOUTS[layout]
    found, right = (torch.randn(shape, generator=generator) for _ in range(2))
    divergences = [
        sum(p * (math.log(p) - math.log(q)) for p, q in zip(softmax(want), softmax(have), strict=True))
        for have, want in zip(rows_of(found, axis), rows_of(right, axis), strict=True)
    ]
    loss = teacher_loss(found, right, torch.zeros(places, dtype=torch.int64))
    assert float(loss) == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)


def test_real_targets_give_the_mean_squared_error(generator):
    output, targets = (torch.randn(4, 2, generator=generator) for _ in range(2))
    wanted = sum((a - b) ** 2 for a, b in zip(output.flatten().tolist(), targets.flatten().tolist(), strict=True)) / 8
    assert float(label_loss(output, targets)) == pytest.approx(wanted, rel=1e-5)


def test_a_teacher_of_real_numbers_gives_the_relative_error(generator):
    output, right = (100 * torch.randn(4, 2, generator=generator) for _ in range(2))
    wanted = float((output - right).square().sum() / right.square().sum())
    assert float(teacher_loss(output, right, torch.zeros(4, 2))) == pytest.approx(wanted, rel=1e-5)


def test_every_output_counts_for_a_teacher_and_only_the_first_for_labels(generator):
    first, second = torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)
    targets = torch.tensor([0, 1, 2, 0])
    assert torch.equal(label_loss((first, second), targets), label_loss(first, targets))
    assert float(teacher_loss((first, second), (first, second), targets)) == pytest.approx(0, abs=1e-6)
    assert float(teacher_loss((first, 2 * second), (first, second), targets)) == pytest.approx(1.0, rel=1e-5)


def test_a_teacher_that_answers_zero_leaves_a_finite_loss():
    assert torch.isfinite(teacher_loss(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype, generator):
    logits = torch.randn(4, 3, generator=generator).to(dtype)
    targets = torch.tensor([0, 1, 2, 0])
    assert label_loss(logits, targets).dtype == torch.float32
    assert teacher_loss(logits, logits, targets).dtype == torch.float32


@pytest.mark.parametrize("label", [-100, -1, 3, 255])
def test_a_class_that_the_model_does_not_have_is_named(label):
    with pytest.raises(DataError, match=f"class numbers 0 to 2, got {label}"):
        label_loss(torch.zeros(2, 3), torch.tensor([0, label]))


@pytest.mark.parametrize("loss", [label_loss, lambda a, t: teacher_loss(a, a, t)])
@pytest.mark.parametrize(("output", "targets"), [((4, 3), (4, 3)), ((4, 3), (5,)), ((4,), (4,)), ((2, 3, 4), (2,))])
def test_shapes_that_do_not_fit_are_named(output, targets, loss):
    with pytest.raises(DataError, match="one class number for each row"):
        loss(torch.zeros(output), torch.zeros(targets, dtype=torch.int64))


@pytest.mark.parametrize("targets", [torch.zeros(4), torch.zeros(4, 3), torch.full((4, 2), float("nan"))])
def test_real_targets_must_fit_and_be_finite(targets):
    with pytest.raises(DataError, match="targets must"):
        label_loss(torch.zeros(4, 2), targets)


def test_targets_of_another_kind_are_refused():
    with pytest.raises(DataError, match=r"got torch\.bool"):
        label_loss(torch.zeros(2, 2), torch.tensor([True, False]))


def test_outputs_are_a_tuple():
    x = torch.ones(1)
    assert outputs_of(x) == (x,)
    assert outputs_of([x, x]) == (x, x)
