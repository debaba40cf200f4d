"""How corrections are judged, and what the search makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fettle.compress.quantize.adaround import AdaRound
from fettle.compress.quantize.bias_correction import BiasCorrection
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.quantize.wide_sums import WideSums
from fettle.core.errors import UsageError
from fettle.core.recipe import Budget
from fettle.evaluate.parity import divergence
from fettle.stages import corrections
from fettle.stages.corrections import find_corrections
from fettle.stages.judge import Judge, helps
from fettle.stages.recipes import light_recipes, linear_share
from fettle.stages.steps import check_order, load_step, precision_of
from fettle.stages.task import Sources, make_task
from fettle.testing.models import CASES, LARGE

scores = hnp.arrays(np.float64, (5, 3), elements=st.floats(-30, 30))


def task_for(case, *, rows=60, **wishes):
    model = case.build()
    inputs = case.data(rows=rows, seed=1)
    with torch.no_grad():
        labels = model(*inputs).argmax(dim=1)
    validation = [(inputs if len(inputs) > 1 else inputs[0], labels)]
    defaults = {"name": "m", "budget": Budget(), "seed": 0, "threads": 1, "batch": 1, "progress": lambda *_: None}
    return make_task(
        model,
        case.data(rows=1),
        Sources(validation=validation),
        metric="accuracy",
        classes=(),
        image=None,
        **defaults | wishes,
    )


@given(a=scores, b=scores)
def test_divergence_is_that_of_kullback_and_leibler(a, b):
    def softmax(row):
        exps = [math.exp(value - max(row)) for value in row]
        return [value / sum(exps) for value in exps]

    for row, (left, right) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        p, q = softmax(left), softmax(right)
        want = sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True) if x > 1e-300 and y > 1e-300)
        assert divergence(a, b)[row] == pytest.approx(want, rel=1e-6, abs=1e-9)


@given(a=scores, shift=st.floats(-20, 20))
def test_scores_that_differ_by_a_constant_do_not_diverge(a, shift):
    assert np.abs(divergence(a, a + shift)).max() < 1e-9


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3)])
def test_what_is_no_class_score_diverges_by_its_squared_error(shape):
    a, b = np.zeros(shape, np.float32), np.full(shape, 0.5, np.float32)
    assert divergence(a, b) == pytest.approx(np.full(4, 0.25))


def test_help_must_be_large_enough_and_sure_enough():
    rng = np.random.default_rng(0)
    old = rng.exponential(size=500)
    assert helps(old, 0.5 * old)
    assert not helps(old, old)
    assert not helps(old, 0.99 * old)  # one percent of the root's half is less than is asked for
    assert not helps(old, 1.5 * old)
    one = old.copy()
    one[0] = 0.0
    assert not helps(old, one), "a single row decides nothing"
    assert not helps(np.zeros(3), np.zeros(3))


def test_what_helps_is_kept_in_order_and_told():
    found = find_corrections(task_for(CASES["residual"]), PostTraining(weight_bits=4))
    names = [spec.name for spec in found.recipe.steps]
    assert names.index("quantize.post_training") < names.index("quantize.adaround")
    assert any(sentence.startswith("adaround: kept, divergence from float") for sentence in found.decisions)
    assert any("left out" in sentence for sentence in found.decisions) or len(names) == 4
    check_order([load_step(spec) for spec in found.recipe.steps])


def test_a_correction_that_fails_is_left_out_and_named(monkeypatch):
    def broken(self, model, context):
        raise RuntimeError("no luck")

    monkeypatch.setattr(AdaRound, "apply", broken)
    found = find_corrections(task_for(CASES["residual"]), PostTraining())
    assert "adaround: left out, it failed: no luck" in found.decisions
    assert "quantize.adaround" not in [spec.name for spec in found.recipe.steps]


def test_without_time_nothing_is_tried_and_that_is_told():
    found = find_corrections(task_for(CASES["mlp"]), PostTraining(), limit_s=-1.0)
    assert [spec.name for spec in found.recipe.steps] == ["quantize.post_training"]
    assert len(found.decisions) == 5
    assert all("not tried, the time limit was near" in sentence for sentence in found.decisions)


def test_the_recipe_that_was_found_gives_the_model_that_was_judged():
    task = task_for(CASES["residual"])
    found = find_corrections(task, PostTraining())
    from fettle.stages.build import prepare

    again, judge = prepare(task, found.recipe).model, Judge(task)
    np.testing.assert_allclose(judge.answers(found.model), judge.answers(again), atol=1e-6)


def test_a_step_before_the_one_it_follows_is_refused():
    with pytest.raises(UsageError, match=r"quantize.adaround must come after quantize.post_training .* got nothing"):
        check_order([AdaRound(), PostTraining()])
    check_order([PostTraining(), WideSums(), AdaRound(), BiasCorrection()])


def test_the_precision_is_that_of_the_last_step_that_has_one():
    assert precision_of([]) == "float"
    assert precision_of([PostTraining(), AdaRound()]) == "int8"


def test_linear_layers_bring_light_recipes_where_they_hold_the_weights():
    names = {recipe.name for recipe in light_recipes(task_for(LARGE["linear"]))}
    assert {"int8 dynamic", "int8 weights", "int4 weights"} <= names
    assert not {"int8 dynamic", "int8 weights"} & {recipe.name for recipe in light_recipes(task_for(CASES["residual"]))}
    assert linear_share(torch.nn.Conv2d(3, 3, 3)) == 0.0
    assert linear_share(torch.nn.ReLU()) == 0.0


def test_every_step_that_is_tried_is_a_step_of_its_own():
    tried = [step for group in (*corrections._BEFORE, *corrections._AFTER) for step in group]
    assert len({(step.step_name(), str(step)) for step in tried}) == len(tried)
