"""The machine and the versions that a figure holds for."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path

_PACKAGES = ("fettle-ml", "torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy")
# Each adds four products of 8-bit numbers into 32 bits at once.
_INTEGER_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@functools.cache
def _processor() -> tuple[str, frozenset[str]]:
    """The name of the processor and its flags; none where the system does not list them."""
    flags, model = frozenset[str](), platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = frozenset(value.split())
            elif key.strip() == "model name":
                model = value.strip()
    return model, flags


def describe_hardware() -> str:
    """One line: processor, cores, and which integer instructions it has."""
    model, flags = _processor()
    integer = ", ".join(flag for flag in _INTEGER_FLAGS if flag in flags) or "no int8 dot product"
    return f"{model}, {os.cpu_count()} cores, {integer}"


def adds_products_in_16_bits() -> bool:
    """Whether this CPU's int8 kernels add two products in 16 bits before they widen: x86 without VNNI does.

    The instruction (vpmaddubsw) multiplies uint8 by int8 and saturates: 2 · 255 · 127 is more than 32767, so only
    weights of 7 bits are safe. Where the flags are not known, an x86 is taken for one that does.
    """
    return platform.machine().lower() in ("x86_64", "amd64", "x86") and not _processor()[1] & set(_INTEGER_FLAGS)


def describe_versions() -> dict[str, str]:
    """Package to version, of those installed, and Python's own."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
