from __future__ import annotations

import sys

import pytest

from fettle.core import plugins
from fettle.core.errors import MissingExtra, UsageError
from fettle.core.runner import RuntimeBase


class Base:
    """What the plug-ins below are."""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of plug-ins; returns a function that adds a file to it."""
    folder = tmp_path / "concept_of_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "base_of_tests", sys.modules[__name__])

    def add(name, text):
        (folder / f"{name}.py").write_text("from base_of_tests import Base\n" + text)

    yield add
    for name in [name for name in sys.modules if name.startswith("concept_of_tests")]:
        del sys.modules[name]


def test_plug_ins_are_found_by_their_files(package):
    package("one", "class One(Base): pass")
    package("_private", "class Two(Base): pass")
    package("broken", "import openvino_that_nobody_has")
    assert plugins.names("concept_of_tests") == ["broken", "one"]
    assert plugins.load("concept_of_tests", "one", Base).__name__ == "One"


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UsageError, match="unknown runtime 'onnxrutime'; did you mean 'onnxruntime'"):
        plugins.load("fettle.runtime", "onnxrutime", RuntimeBase)


@pytest.mark.parametrize("name", ["", "_onnx", "..core", "os", "../x", "onnxruntime.x"])
def test_only_plug_ins_are_imported(name):
    with pytest.raises(UsageError, match="unknown runtime"):
        plugins.load("fettle.runtime", name, RuntimeBase)


def test_a_package_that_is_none_is_refused():
    for name in ("fettle.core.names", "json.decoder"):
        with pytest.raises(UsageError, match="no package of plug-ins"):
            plugins.names(name)


def test_a_missing_extra_says_how_to_install_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    package("fast", "import openvino\nclass Fast(Base): pass")
    with pytest.raises(
        MissingExtra, match=r"concept_of_tests 'fast' needs openvino: pip install 'fettle-ml\[openvino\]'"
    ):
        plugins.load("concept_of_tests", "fast", Base)
    package("plain", "class Plain(Base): pass")
    assert list(plugins.installed("concept_of_tests", Base)) == ["plain"]


def test_a_hidden_runtime_is_missing_and_the_others_stay(monkeypatch):
    monkeypatch.delitem(sys.modules, "fettle.runtime.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"runtime 'openvino' needs openvino: pip install 'fettle-ml\[openvino\]'"):
        plugins.load("fettle.runtime", "openvino", RuntimeBase)
    found = plugins.installed("fettle.runtime", RuntimeBase)
    assert "openvino" not in found
    assert "onnxruntime" in found


def test_a_missing_module_that_is_no_extra_is_not_hidden(package):
    package("broken", "import module_that_nobody_has")
    with pytest.raises(ModuleNotFoundError, match="module_that_nobody_has"):
        plugins.load("concept_of_tests", "broken", Base)


@pytest.mark.parametrize("text", ["", "class One(Base): pass\nclass Two(Base): pass"])
def test_a_file_holds_exactly_one(package, text):
    package("wrong", text)
    with pytest.raises(TypeError, match="exactly one Base"):
        plugins.load("concept_of_tests", "wrong", Base)
