"""Serving, monitoring, the registry and the command line start without torch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "matplotlib", "sklearn", "openvino")
LIGHT = (
    "fettle",
    "fettle.__main__",
    "fettle.cli",
    "fettle.core.project",
    "fettle.serve.server",
    "fettle.serve.app",
    "fettle.serve.worker",
    "fettle.registry.store",
    "fettle.monitor.report",
    "fettle.runtime.onnxruntime",
    "fettle.runtime.null",
)


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_loads_nothing_heavy(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist yet")
    code = (
        f"import sys, json, {module}\n"
        f"print(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}} & set({HEAVY!r}))))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_a_worker_starts_without_what_only_the_front_needs():
    """One is started for each core, and again for each that dies: an eighth of its start went to this."""
    code = "import sys, fettle.serve.worker; print([n for n in ('asyncio', 'prometheus_client') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
