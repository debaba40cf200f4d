"""Every step that is found keeps what fettle.testing.steps asks of it; and the kit catches those that do not."""

from __future__ import annotations

import copy
import importlib
import pkgutil
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.utils._pytree import tree_structure

import fettle.compress
from fettle.compress.capture import capture
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.step import Context, Step
from fettle.testing import steps


def found() -> Iterator[type[Step]]:
    """Steps are nested plug-ins: any module below fettle.compress may hold one."""
    for module in pkgutil.walk_packages(fettle.compress.__path__, "fettle.compress."):
        for value in vars(importlib.import_module(module.name)).values():
            if (
                isinstance(value, type)
                and issubclass(value, Step)
                and value.__module__ == module.name
                and value is not Step
            ):
                yield value


FOUND = sorted(found(), key=lambda cls: cls.step_name())


@pytest.mark.parametrize("check", steps.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", FOUND, ids=lambda cls: cls.step_name())
def test_every_step_conforms(cls, check):
    check(cls())


@pytest.mark.parametrize("check", [steps.repeats_itself, steps.agrees_with_the_original], ids=lambda c: c.__name__)
def test_min_max_calibration_conforms_too(check):
    check(PostTraining(observer="min_max", batches=3))


def test_the_steps_are_found_by_their_files():
    assert PostTraining in FOUND


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad(Step):
    """A step with one fault."""

    fault: str = ""

    def apply(self, model: torch.nn.Module, context: Context) -> torch.nn.Module:
        changed = model if self.fault == "in place" else copy.deepcopy(model)
        if self.fault == "noise in a graph":
            changed = capture(model, context.example)
        with torch.no_grad():
            for parameter in changed.parameters():
                if self.fault in ("global generator", "noise in a graph"):
                    parameter.add_(torch.randn_like(parameter))
                elif self.fault == "wrong answers":
                    parameter.copy_(-parameter.abs())
                else:
                    parameter.mul_(1.5)
        if self.fault == "drops an output":
            return torch.nn.Sequential(changed, torch.nn.Flatten(), torch.nn.LazyLinear(9)).eval()
        if self.fault == "training mode":
            model.train()
        if self.fault == "python generator":
            random.random()
        return changed if self.fault in ("in place", "noise in a graph") else changed.eval()


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("in place", steps.leaves_its_input_untouched),
        ("training mode", steps.leaves_its_input_untouched),
        ("global generator", steps.leaves_global_state_untouched),
        ("python generator", steps.leaves_global_state_untouched),
        ("global generator", steps.repeats_itself),
        ("noise in a graph", steps.repeats_itself),
        ("", steps.shrinks),
        ("drops an output", steps.keeps_inputs_and_outputs),
        ("wrong answers", steps.agrees_with_the_original),
    ],
)
def test_the_kit_catches_a_bad_step(fault, check):
    with pytest.raises(AssertionError):
        check(Bad(fault=fault))


def clamp_of(graph):
    return next(node for node in graph.graph.nodes if node.target is torch.ops.aten.clamp.default)


CHANGES = {
    "one bit": lambda graph: graph.get_buffer("norm.running_var").view(torch.int32).bitwise_xor_(1),
    "a tensor that no state holds": lambda graph: graph.lifted_tensor_0.neg_(),
    "an argument": lambda graph: clamp_of(graph).update_arg(2, 5.5),
    "a type": lambda graph: clamp_of(graph).meta.update(val=torch.ones(2, 2)),
    "the form of the output": lambda graph: setattr(graph, "_out_spec", tree_structure([0])),
    "the code": lambda graph: (clamp_of(graph).replace_all_uses_with(clamp_of(graph).args[0]), graph.recompile()),
}


class Shifted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(x).clamp(0.0, 6.0) + torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_content_of_a_graph_is_other_after_any_change(change):
    graph = capture(Shifted().eval(), (torch.ones(2, 2),))
    before = steps.content_of_graph(graph)
    assert before is not None
    other = capture(graph, (torch.ones(2, 2),))
    assert steps.content_of_graph(other) == before
    change(other)
    assert steps.content_of_graph(other) != before
    assert steps.content_of_graph(graph) == before


class Forgetful(PostTraining):
    """A step whose JSON lacks a parameter."""

    def spec(self):
        return PostTraining(batches=self.batches).spec()


def test_the_kit_catches_a_lost_parameter():
    with pytest.raises(AssertionError):
        steps.round_trips_through_json(Forgetful(observer="min_max"))
