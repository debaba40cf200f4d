"""The machine and the versions that a figure holds for."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

_PACKAGES = ("fettle-ml", "torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy")
# Without these, int8 kernels exist but are not much faster than float ones.
_INTEGER_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def describe_hardware() -> str:
    """One line: processor, cores, and which integer instructions it has."""
    flags, model = set[str](), platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
            elif key.strip() == "model name":
                model = value.strip()
    integer = ", ".join(flag for flag in _INTEGER_FLAGS if flag in flags) or "no int8 dot product"
    return f"{model}, {os.cpu_count()} cores, {integer}"


def describe_versions() -> dict[str, str]:
    """Package to version, of those installed, and Python's own."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
