"""A recipe for one engine: weights that it multiplies exactly, sums that it adds before it rounds."""

from __future__ import annotations

import pytest

from fettle.compress.quantize import AdaRound, Dynamic, PostTraining, QuantizationAware, WeightOnly
from fettle.core.recipe import Recipe
from fettle.core.runner import RuntimeBase
from fettle.runtime.eager import Eager
from fettle.stages.fit import fit


class Exact(Eager):
    """Multiplies 8 bits exactly, as VNNI does."""


class Pairs(Eager):
    """Adds two products in 16 bits."""

    @classmethod
    def weight_bits(cls) -> int:
        return 7


class Wide(Eager):
    """Adds before it rounds."""

    wide_sums = True


def fitted(*steps, runtimes: list[type[RuntimeBase]]) -> tuple[list[tuple[str, object]], list[str]]:
    notes: list[str] = []
    recipe = fit(Recipe(name="x", steps=tuple(step.spec() for step in steps)), runtimes, note=notes.append)
    return [(spec.name, spec.parameters.get("weight_bits")) for spec in recipe.steps], notes


@pytest.mark.parametrize("step", [PostTraining(), QuantizationAware(), Dynamic()])
def test_integers_are_narrowed_where_pairs_of_products_would_overflow(step):
    (found,), notes = fitted(step, runtimes=[Pairs])
    assert found == (step.step_name(), 7)
    assert notes == [
        "weights have 7 bits, not 8: without VNNI this CPU's int8 kernels add products in pairs in 16 bits, which "
        "wider weights overflow"
    ]
    assert fitted(step, runtimes=[Exact]) == ([(step.step_name(), step.weight_bits)], [])


@pytest.mark.parametrize("step", [PostTraining(weight_bits=4), WeightOnly(bits=8), AdaRound()])
def test_what_does_not_overflow_stays(step):
    found, notes = fitted(step, runtimes=[Pairs])
    assert (found, notes) == ([(step.step_name(), step.spec().parameters.get("weight_bits"))], [])


def test_the_narrowest_engine_decides_for_several():
    assert fitted(PostTraining(), runtimes=[Exact, Pairs])[0] == [("quantize.post_training", 7)]


def test_wide_sums_come_right_after_the_quantizer():
    names = [name for name, _ in fitted(PostTraining(), AdaRound(), runtimes=[Wide])[0]]
    assert names == ["quantize.post_training", "quantize.wide_sums", "quantize.adaround"]
    assert fitted(PostTraining(), runtimes=[Wide, Exact])[0] == [("quantize.post_training", 8)]
    assert fitted(runtimes=[Wide]) == ([], [])
