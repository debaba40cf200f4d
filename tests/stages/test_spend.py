"""What a slack in latency is spent on: in small made-up worlds, and on a small network in a real engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fettle
from fettle.compress.capture import capture
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.step import Context
from fettle.evaluate.layers import LayerLine
from fettle.evaluate.parity import divergence
from fettle.stages.spend import Allowance, Price, repeat, spend, work_of
from fettle.testing.models import CASES

ROWS = 50


class World:
    """A judge of models that are sets of layers in float: every other layer adds its noise to all answers alike."""

    def __init__(self, noise):
        self.noise = noise
        self.inputs = (torch.zeros(ROWS, 1),)
        self.outputs = np.zeros((ROWS, 1))
        self.size = np.linspace(0.9, 1.1, ROWS)[:, None]

    def answers(self, model, *, inputs=None):
        left = sum(noise for layer, noise in self.noise.items() if layer not in model)
        return left * self.size[: len(inputs[0]) if inputs else ROWS]

    def divergence(self, model):
        return divergence(self.outputs, self.answers(model))


def lines_of(names):
    return [LayerLine(layer=name, kind="linear", sqnr_db=30.0, spread=1.0) for name in names]


def run(noise, cost, *, slack=0.03, work=None, growth=1.0, spread=0.0, proceed=lambda share: True):
    def price(model):
        ratio = 1 + sum(cost[layer] for layer in model)
        return Price(ratio=ratio, high=ratio + spread, growth=growth)

    allowance = Allowance(slack=slack, price=price, latency_ms=2.0, proceed=proceed)
    return spend(frozenset, World(noise), lines_of(noise), work or dict.fromkeys(noise, 0.1), allowance)


def test_the_layer_that_takes_away_most_for_its_work_comes_first_and_is_paid_for():
    spent = run({"small": 2.0, "large": 3.0, "tiny": 1.0}, {"small": 0.01, "large": 0.025, "tiny": 0.005},
                work={"small": 0.1, "large": 0.8, "tiny": 0.1})  # fmt: skip
    assert spent.layers == ("small", "tiny")
    by_name = {line.layer: line for line in spent.lines}
    assert [line.layer for line in spent.lines] == ["small", "large", "tiny"]
    assert (by_name["small"].precision, by_name["small"].cost_ms) == ("float", pytest.approx(0.02))
    assert by_name["tiny"].cost_ms == pytest.approx(0.01)
    assert (by_name["large"].precision, by_name["large"].cost_ms) == ("int8", None)
    assert [decision.partition(",")[0] for decision in spent.decisions] == [
        "small in float: kept",
        "tiny in float: kept",
        "large in float: tried and left out",
    ]
    assert "takes 1.015 times as long as in int8" in spent.decisions[1]


costs = st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(st.floats(0, 9), st.floats(-0.01, 0.05)), min_size=1)


@given(world=costs, slack=st.sampled_from([0.0, 0.01, 0.03, 0.1]))
def test_what_is_kept_stays_inside_the_slack_and_comes_nearer_each_time(world, slack):
    noise, cost = ({name: pair[index] for name, pair in world.items()} for index in (0, 1))
    spent = run(noise, cost, slack=slack)
    assert len(spent.decisions) <= 6
    assert set(spent.layers) <= set(noise)
    so_far = 1.0
    for count in range(1, len(spent.layers) + 1):
        so_far = 1 + sum(cost[layer] for layer in spent.layers[:count])
        assert so_far <= 1 + slack + 1e-9
    left = sum(noise.values())
    for layer in spent.layers:
        assert noise[layer] >= 0.02 * left * 0.99
        left -= noise[layer]


def test_a_timing_too_noisy_to_be_sure_and_a_file_too_large_buy_nothing():
    assert run({"a": 1.0}, {"a": 0.02}).layers == ("a",)
    assert run({"a": 1.0}, {"a": 0.02}, spread=0.02).layers == ()
    assert run({"a": 1.0}, {"a": 0.02}, growth=1.2).layers == ()


def test_an_engine_that_refuses_a_layer_in_float_is_named_and_the_next_is_tried():
    def price(model):
        if "a" in model:
            raise RuntimeError("no such kernel")
        return Price(ratio=1.0, high=1.0, growth=1.0)

    allowance = Allowance(slack=0.03, price=price, latency_ms=1.0, proceed=lambda share: True)
    spent = spend(frozenset, World({"a": 3.0, "b": 2.0}), lines_of("ab"), {"a": 0.5, "b": 0.5}, allowance)
    assert spent.layers == ("b",)
    assert spent.decisions[0] == "a in float: left out, the engine refused it: no such kernel"


def test_no_time_and_nothing_to_gain_buy_nothing():
    assert run({"a": 1.0}, {"a": 0.0}, proceed=lambda share: False).layers == ()
    assert run({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}).layers == ()
    assert run({"a": 1.0, "b": 0.001}, {"a": 0.5, "b": 0.0}).layers == ()  # b takes away too little to be tried


def test_a_price_far_outside_the_slack_is_known_after_two_timings():
    ratios = iter([1.5, 1.4, 1.0, 1.0, 1.0])
    assert repeat(lambda: next(ratios), slack=0.03) == Price(ratio=1.45, high=1.4, growth=1.0)
    assert not repeat(lambda: 1.5, slack=0.03).fits(0.03)
    ratios = iter([1.5, 1.0, 1.0, 1.01, 1.02])
    assert repeat(lambda: next(ratios), slack=0.03).fits(0.03)


def test_work_is_counted_in_multiplications():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    graph = capture(model, (x[:2],))
    simulated = PostTraining().apply(graph, Context(example=(x[:2],), calibration=[(x,)]))
    first, second = 36 * 8 * 27, 36 * 4 * 8
    assert work_of(simulated) == pytest.approx({"0": first / (first + second), "1": second / (first + second)})


@pytest.mark.parametrize("slack", [0.0, 50.0])
def test_in_a_real_engine_layers_go_back_to_float_for_a_slack_and_only_then(tmp_path, slack):
    case = CASES["residual"]
    model, batches = case.build(), [(x, torch.zeros(len(x[0]))) for x in (case.data(rows=64),)]
    data = [(x[0], y) for x, y in batches]
    outcome = fettle.optimize(
        model,
        (data[0][0][:2],),
        validation=data,
        metric=lambda outputs, targets: 1.0,
        budget=fettle.Budget(slack=slack),
        runtimes=("onnxruntime",),
        home=tmp_path,
        register=False,
    )
    labels = [candidate.label for candidate in outcome.comparison.candidates]
    found = "int8 with float layers in onnxruntime" in labels
    assert found is (slack > 0)
    assert found is any(line.precision == "float" for line in outcome.comparison.layers)
    if found:
        trials = {trial.candidate.label: trial for trial in outcome.candidates}
        near, plain = (trials[f"int8{more} in onnxruntime"] for more in (" with float layers", ""))
        assert near.report["parity.divergence"].value < plain.report["parity.divergence"].value
        steps = [step.name for step in near.artifact.manifest.recipe.steps]
        assert "quantize.give_back" in steps
