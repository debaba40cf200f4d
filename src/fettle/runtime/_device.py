"""Which device runs a model, and which precisions that gives a runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from fettle.core.errors import UsageError
from fettle.core.machine import adds_products_in_16_bits

VARIABLE = "FETTLE_DEVICE"


def wanted_device() -> str:
    """What FETTLE_DEVICE says: "cpu", which it is where it is not set, "cuda" or "cuda:1".

    Never the first GPU that happens to be there: figures and golden answers hold for the device they were taken on,
    and a service must not move because a machine has one more. Raises UsageError for anything else.

    >>> wanted_device()
    'cpu'
    """
    device = os.environ.get(VARIABLE) or "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise UsageError(f'{VARIABLE} must be "cpu", "cuda" or like "cuda:1", got "{device}"')
    return device


def gpu_number(device: str) -> int | None:
    """The number of the GPU, None for the CPU.

    >>> gpu_number("cpu"), gpu_number("cuda"), gpu_number("cuda:1")
    (None, 0, 1)
    """
    return None if device == "cpu" else int(device.partition(":")[2] or 0)


def exact_weight_bits() -> int:
    """How many bits a weight may have so that no sum of its products with uint8 overflows, on the device in use."""
    return 7 if wanted_device() == "cpu" and adds_products_in_16_bits() else 8


class ByMachine:
    """`precisions` of a runtime, read from its class: those it always has, and those that this machine adds.

    found: asked at every reading, so that importing a runtime asks the machine nothing.

    >>> class Engine:
    ...     precisions = ByMachine(frozenset({"float"}), lambda: frozenset({"bf16"}))
    >>> sorted(Engine.precisions)
    ['bf16', 'float']
    """

    def __init__(self, always: frozenset[str], found: Callable[[], frozenset[str]]) -> None:
        self._always, self._found = always, found

    def __get__(self, instance: Any, owner: type) -> frozenset[str]:
        return self._always | self._found()
