"""The names that users rely on: another one, or one less, is a decision and not an accident."""

import subprocess
import sys

import pytest

import fettle

NAMES = [
    "Artifact",
    "Budget",
    "FettleError",
    "Home",
    "ImagePreprocess",
    "Measurement",
    "Outcome",
    "Project",
    "Recipe",
    "Registry",
    "Report",
    "Runner",
    "Signature",
    "TensorSpec",
    "load",
    "optimize",
]


def test_the_public_names_are_these():
    assert fettle.__all__ == NAMES
    assert dir(fettle) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_name_resolves_to_something_documented(name):
    found = getattr(fettle, name)
    assert found.__module__.startswith("fettle")
    assert found.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        fettle.optimise  # noqa: B018


@pytest.mark.parametrize("statement", ["import fettle", "import fettle.cli", "from fettle import Registry, load"])
def test_torch_is_not_imported_before_it_is_needed(statement):
    heavy = "{'torch', 'onnxruntime', 'openvino'} & set(sys.modules)"
    code = f"import sys\n{statement}\nassert not {heavy}, {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
