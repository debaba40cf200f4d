"""What a recipe becomes for one engine on this machine, so that its steps see what will really be computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fettle.compress.quantize.dynamic import Dynamic
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.quantize.qat import QuantizationAware
from fettle.compress.quantize.wide_sums import WideSums
from fettle.compress.step import Step
from fettle.core.recipe import Recipe, StepSpec
from fettle.core.runner import RuntimeBase
from fettle.stages.steps import load_step


def fit(recipe: Recipe, runtimes: Sequence[type[RuntimeBase]], *, note: Callable[[str], None]) -> Recipe:
    """The recipe with weights as wide as these engines multiply exactly, and with sums as wide as all of them add.

    note: told in a sentence that the weights became narrower than was asked.
    """
    bits = min(runtime.weight_bits() for runtime in runtimes)
    wide = all(runtime.wide_sums for runtime in runtimes)
    steps: list[StepSpec] = []
    for spec in recipe.steps:
        step = load_step(spec)
        fitted = _narrowed(step, bits)
        if fitted is not step:
            note(
                f"weights have {bits} bits, not 8: without VNNI this CPU's int8 kernels add products in pairs in 16 "
                "bits, which wider weights overflow"
            )
        steps.append(fitted.spec())
        if isinstance(step, PostTraining) and wide:
            steps.append(WideSums().spec())
    return replace(recipe, steps=tuple(steps))


def _narrowed(step: Step, bits: int) -> Step:
    """The step with weights of at most so many bits, where it multiplies integers; any other as it is."""
    if isinstance(step, PostTraining | QuantizationAware | Dynamic) and (step.weight_bits or 8) > bits:
        return replace(step, weight_bits=bits)
    return step
