"""What is worth trying on a model besides int8 everywhere: judged by its layers, decided by measurement."""

from __future__ import annotations

import torch

from fettle.compress.quantize.dynamic import Dynamic
from fettle.compress.quantize.half import Half
from fettle.compress.quantize.weight_only import WeightOnly
from fettle.compress.step import Step
from fettle.core.recipe import Recipe
from fettle.stages.task import Task

# Below this share of all weights in linear layers, rounding those alone changes neither size nor time enough.
_LINEAR_SHARE = 0.5


def light_recipes(task: Task) -> tuple[Recipe, ...]:
    """Recipes without calibration: weights alone and activations per call, where linear layers hold most weights.

    And 16 bits, wherever a layer has a matrix: a runtime offers them only where the device multiplies in them, so
    elsewhere nothing comes of these two.
    """
    steps: dict[str, Step] = {}
    if linear_share(task.model) >= _LINEAR_SHARE:
        steps |= {
            "int8 dynamic": Dynamic(),
            "int8 weights": WeightOnly(bits=8),
            "int4 weights": WeightOnly(bits=4),
        }
    if any(parameter.ndim > 1 for parameter in task.model.parameters()):
        steps |= {"bf16": Half(), "fp16": Half(dtype="float16")}
    return tuple(
        Recipe(name=name, steps=(step.spec(),), budget=task.budget, seed=task.seed) for name, step in steps.items()
    )


def linear_share(model: torch.nn.Module, *, smallest: int = 4096) -> float:
    """Of all weights, the share in matrices of linear layers, attention's among them, of at least `smallest` weights.

    >>> linear_share(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Conv2d(64, 64, 1, bias=False)))
    0.5
    """
    kinds = (torch.nn.Linear, torch.nn.MultiheadAttention)
    held = {id(p): p.numel() for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    large = sum(count for count in held.values() if count >= smallest)
    return large / max(sum(p.numel() for p in model.parameters()), 1)
