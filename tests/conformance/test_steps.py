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

import fettle.compress
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
        with torch.no_grad():
            for parameter in changed.parameters():
                if self.fault == "global generator":
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
        return changed.eval() if self.fault != "in place" else changed


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("in place", steps.leaves_its_input_untouched),
        ("training mode", steps.leaves_its_input_untouched),
        ("global generator", steps.leaves_global_state_untouched),
        ("python generator", steps.leaves_global_state_untouched),
        ("global generator", steps.repeats_itself),
        ("", steps.shrinks),
        ("drops an output", steps.keeps_inputs_and_outputs),
        ("wrong answers", steps.agrees_with_the_original),
    ],
)
def test_the_kit_catches_a_bad_step(fault, check):
    with pytest.raises(AssertionError):
        check(Bad(fault=fault))


class Forgetful(PostTraining):
    """A step whose JSON lacks a parameter."""

    def spec(self):
        return PostTraining(batches=self.batches).spec()


def test_the_kit_catches_a_lost_parameter():
    with pytest.raises(AssertionError):
        steps.round_trips_through_json(Forgetful(observer="min_max"))
