"""Which layers go back to float: ranking, growing and shrinking, each against small made-up worlds."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fettle.compress.quantize.adaround import AdaRound
from fettle.compress.quantize.post_training import PostTraining
from fettle.core.recipe import Recipe
from fettle.evaluate.layers import LayerLine
from fettle.stages.give_back import _grow, _shrink, with_layers_in_float
from fettle.stages.sensitivity import rank, with_costs


def line(name, *, share=None, cost=None, sqnr=30.0):
    return LayerLine(layer=name, kind="convolution", sqnr_db=sqnr, spread=1.0, share=share, cost_ms=cost)


def always():
    return True


def test_the_best_gain_for_its_cost_comes_first():
    lines = [
        line("cheap", share=0.2, cost=0.1),
        line("dear", share=0.3, cost=1.0),
        line("useless", share=-0.1, cost=0.1),
    ]
    assert rank(lines, latency_ms=1.0) == ["cheap", "dear"]


def test_a_cost_below_the_noise_of_timing_is_no_advantage():
    lines = [line("lucky", share=0.2, cost=-0.5), line("better", share=0.3, cost=0.01)]
    assert rank(lines, latency_ms=1.0) == ["better", "lucky"]


def test_what_was_not_timed_costs_the_average():
    lines = [line("timed", share=0.2, cost=0.2), line("dear", share=0.2, cost=0.6), line("unknown", share=0.2)]
    assert rank(lines, latency_ms=1.0) == ["timed", "unknown", "dear"]


def test_what_was_not_reached_is_not_ranked():
    assert rank([line("a"), line("b", share=0.1)], latency_ms=1.0) == ["b"]
    assert rank([], latency_ms=1.0) == []


def test_costs_are_written_into_the_lines():
    assert [each.cost_ms for each in with_costs([line("a"), line("b", cost=3.0)], {"a": 1.0})] == [1.0, 3.0]


worlds = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1)


@given(world=worlds, floor=st.integers(0, 60))
def test_growing_reaches_every_floor_that_can_be_reached(world, floor):
    """Each layer is worth a fixed gain: the floor is met, or all are given back."""

    def score(layers):
        return sum(world[layer] for layer in layers)

    def order(chosen):
        return sorted((layer for layer in world if layer not in chosen), key=lambda layer: -world[layer])

    chosen = _grow(order, score, floor, proceed=always)
    assert len(set(chosen)) == len(chosen)
    assert score(chosen) >= min(floor, sum(world.values()))
    if floor <= 0:
        assert chosen == []
    kept = _shrink(chosen, score, floor, proceed=always)
    assert set(kept) <= set(chosen)
    if score(chosen) >= floor:
        assert score(kept) >= floor
        # Best gains first is already the fewest.
        fewest = next(
            n for n in range(len(world) + 1) if any(score(c) >= floor for c in itertools.combinations(world, n))
        )
        assert len(kept) == fewest


def test_a_layer_that_lowers_the_metric_leads_to_a_new_ranking():
    asked = []

    def order(chosen):
        asked.append(tuple(chosen))
        return [layer for layer in ("a", "harmful", "b") if layer not in chosen]

    def score(layers):
        return ("a" in layers) + ("b" in layers) - 2 * ("harmful" in layers) * ("b" not in layers)

    _grow(order, score, 2, proceed=always)
    assert asked[:2] == [(), ("a",)]


def test_no_time_means_no_layers():
    assert _grow(lambda chosen: ["a"], lambda layers: 0, 1, proceed=lambda: False) == []
    assert _shrink(["a", "b"], lambda layers: 5, 1, proceed=lambda: False) == ["a", "b"]


def test_what_the_floor_does_not_need_goes_back_to_integers():
    assert _shrink(["a", "b", "c"], lambda layers: 1 if "c" in layers else 0, 1, proceed=always) == ["c"]
    assert _shrink(["a", "b"], lambda layers: 0, 1, proceed=always) == ["a", "b"]


def test_layers_go_back_before_the_corrections():
    recipe = Recipe(name="int8", steps=(PostTraining().spec(), AdaRound().spec()))
    found = with_layers_in_float(recipe, ("conv1",))
    assert [spec.name for spec in found.steps] == ["quantize.post_training", "quantize.give_back", "quantize.adaround"]
    assert found.steps[1].parameters == {"layers": ("conv1",)}
    assert found.name == "int8 and float"
