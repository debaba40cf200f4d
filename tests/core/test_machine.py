"""What this machine is said to be, and whether its int8 kernels overflow."""

from __future__ import annotations

import platform

import pytest

from fettle.core import machine
from fettle.core.machine import adds_products_in_16_bits, describe_hardware
from fettle.runtime._device import exact_weight_bits


def pretend(monkeypatch, kind, *flags):
    monkeypatch.setattr(platform, "machine", lambda: kind)
    monkeypatch.setattr(machine, "_processor", lambda: ("Some CPU", frozenset(flags)))


@pytest.mark.parametrize(
    ("kind", "flags", "overflows"),
    [
        ("x86_64", ("avx2",), True),
        ("AMD64", (), True),
        ("x86_64", ("avx2", "avx_vnni"), False),
        ("x86_64", ("avx512_vnni",), False),
        ("x86_64", ("amx_int8",), False),
        ("aarch64", ("asimddp",), False),
        ("arm64", (), False),
    ],
)
def test_x86_without_vnni_adds_in_16_bits(monkeypatch, kind, flags, overflows):
    pretend(monkeypatch, kind, *flags)
    assert adds_products_in_16_bits() is overflows
    assert exact_weight_bits() == (7 if overflows else 8)


def test_a_gpu_is_not_the_cpu(monkeypatch):
    pretend(monkeypatch, "x86_64", "avx2")
    monkeypatch.setenv("FETTLE_DEVICE", "cuda")
    assert exact_weight_bits() == 8


def test_the_largest_sum_of_a_pair_tells_how_many_bits_are_exact():
    for bits, fits in ((8, False), (7, True)):
        assert (2 * 255 * 2 ** (bits - 1) <= 2**15 - 1) is fits


def test_hardware_is_one_line(monkeypatch):
    pretend(monkeypatch, "x86_64", "avx2")
    assert describe_hardware().startswith("Some CPU, ")
    assert describe_hardware().endswith(" cores, no int8 dot product")
    pretend(monkeypatch, "x86_64", "avx_vnni", "avx512_vnni")
    assert describe_hardware().endswith(" cores, avx512_vnni, avx_vnni")
