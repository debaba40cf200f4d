"""Give layers back to float until the floor holds: the fewest that measurement can find, for the least time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fettle.compress.quantize.give_back import GiveBack
from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.step import Step
from fettle.core.recipe import Recipe
from fettle.evaluate.layers import LayerLine
from fettle.stages.corrections import Corrected
from fettle.stages.judge import Judge
from fettle.stages.sensitivity import lighten, measure_shares, rank, with_costs
from fettle.stages.steps import carry_out, load_step, simulated_metric
from fettle.stages.task import Task

_TIMED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What must hold, and how the price is found.

    floor: least metric. latency_ms: of the model in int8. cost_ms: what a model that has one layer given back takes
    more than that, measured in an engine; it may raise. limit_s: no measurement is begun after it.
    """

    floor: float
    latency_ms: float
    cost_ms: Callable[[Recipe], float]
    limit_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenBack:
    """The recipe with layers in float, and every layer's line."""

    recipe: Recipe
    lines: tuple[LayerLine, ...]


def give_back(
    task: Task,
    corrected: Corrected,
    lines: Sequence[LayerLine],
    judge: Judge,
    wanted: Wanted,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> GivenBack | None:
    """Rank the layers by gain over cost, give back until the metric of the simulation reaches the floor, then try to
    take each back into int8 again. None where nothing helps.
    """
    start = time.monotonic()

    def proceed(share: float) -> bool:
        progress(share / 2)
        return wanted.limit_s is None or time.monotonic() - start < wanted.limit_s

    assert isinstance(corrected.model, Simulated)
    # A correction makes up for the errors before it: with one of those gone, it would be an error itself.
    plain, corrections = corrected.model.uncorrected(), corrections_of(corrected.recipe)
    lines = measure_shares(lighten(task, plain), judge, lines, proceed=proceed)
    lines = with_costs(lines, _costs(corrected.recipe, lines, wanted, proceed))

    def score(layers: Sequence[str]) -> float:
        steps = (GiveBack(layers=tuple(layers)), *corrections)
        return simulated_metric(task, carry_out(task, steps, plain, seed=task.seed))

    def order(chosen: Sequence[str]) -> list[str]:
        """What is left, ranked with the chosen ones already in float: their absence changes what the others cost."""
        left = tuple(line for line in lines if line.layer not in chosen)
        if chosen:
            lighter = lighten(task, plain)
            left = measure_shares(lambda more: lighter((*chosen, *more)), judge, left, proceed=proceed)
        ranked = rank(left, latency_ms=wanted.latency_ms)
        weakest = sorted((line for line in left if line.layer not in ranked), key=lambda line: line.sqnr_db)
        return [*ranked, *(line.layer for line in weakest)]

    chosen = _grow(order, score, wanted.floor, proceed=lambda: proceed(1.0))
    if not chosen:
        return None
    chosen = _shrink(chosen, score, wanted.floor, proceed=lambda: proceed(1.0))
    progress(1.0)
    lines = tuple(replace(line, precision="float") if line.layer in chosen else line for line in lines)
    recipe = with_layers_in_float(corrected.recipe, chosen)
    return GivenBack(recipe=recipe, lines=lines)


def with_layers_in_float(recipe: Recipe, layers: Sequence[str]) -> Recipe:
    """The recipe with these layers given back before the corrections, which then see what is deployed.

    Layers that it gave back before are given back no longer, unless they are named too.
    """
    steps = []
    for spec in recipe.steps:
        if spec.name != GiveBack.step_name():
            steps.append(spec)
        if spec.name == PostTraining.step_name():
            steps.append(GiveBack(layers=tuple(layers)).spec())
    return replace(recipe, name="int8 and float", steps=tuple(steps))


def layers_in_float(recipe: Recipe) -> tuple[str, ...]:
    """The layers that the recipe gives back."""
    given = [load_step(spec) for spec in recipe.steps if spec.name == GiveBack.step_name()]
    return tuple(layer for step in given if isinstance(step, GiveBack) for layer in step.layers)


def corrections_of(recipe: Recipe) -> tuple[Step, ...]:
    """The steps after the one that quantizes."""
    steps = [load_step(spec) for spec in recipe.steps]
    return tuple(step for step in steps if step.follows == PostTraining.step_name())


def _costs(
    recipe: Recipe, lines: Sequence[LayerLine], wanted: Wanted, proceed: Callable[[float], bool]
) -> dict[str, float]:
    """Measured for the layers that take away most; one that the engine refuses costs what it likes, it is not timed."""
    first = sorted((line for line in lines if line.share), key=lambda line: line.share or 0.0, reverse=True)[:_TIMED]
    found: dict[str, float] = {}
    for line in first:
        if not proceed(1.0):
            break
        try:
            found[line.layer] = wanted.cost_ms(with_layers_in_float(recipe, (line.layer,)))
        except Exception:
            continue
    return found


def _grow(
    order: Callable[[Sequence[str]], list[str]],
    score: Callable[[Sequence[str]], float],
    floor: float,
    *,
    proceed: Callable[[], bool],
) -> list[str]:
    """Add in order until the floor holds; where a layer lowers the metric, the others are ranked anew."""
    chosen: list[str] = []
    best = score(chosen)
    while best < floor and proceed() and (left := order(chosen)):
        for position, layer in enumerate(left):
            found = score([*chosen, layer])
            if position > 0 and found < best:
                break
            chosen, best = [*chosen, layer], found  # the first of a ranking is taken in any case: the loop ends
            if best >= floor or not proceed():
                break
    return chosen


def _shrink(
    chosen: Sequence[str], score: Callable[[Sequence[str]], float], floor: float, *, proceed: Callable[[], bool]
) -> list[str]:
    """Put back into int8 what the floor does not need, the last given first."""
    kept = list(chosen)
    if len(chosen) > 1 and score(chosen) < floor:
        return kept
    for layer in reversed(chosen[:-1]):
        without = [each for each in kept if each != layer]
        if proceed() and score(without) >= floor:
            kept = without
    return kept
