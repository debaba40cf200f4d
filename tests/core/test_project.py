from __future__ import annotations

import sys

import pytest

from fettle.core.errors import ProjectError
from fettle.core.project import Project

GOOD = """
name = "digits"
[model]
build = "made_model:build"
example = "made_model:example"
[data]
validation = "made_model:validation"
"""
MODULE = """
CONSTANT = 3
def build(): return "model"
def example(): return ("x",)
def validation(): return []
def fails(): raise ValueError("no weights here")
def needs(): import module_that_nobody_has
"""


@pytest.fixture
def project(tmp_path):
    """A function (toml, module) -> path of the folder."""

    def write(toml=GOOD, module=MODULE, folder="project"):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "fettle.toml").write_text(toml, encoding="utf-8")
        (place / "made_model.py").write_text(module)
        return place

    yield write
    sys.modules.pop("made_model", None)


def problem(call):
    with pytest.raises(ProjectError) as caught:
        call()
    return str(caught.value)


def test_a_project_is_opened_by_file_or_folder(project):
    place = project()
    for path in (place, place / "fettle.toml"):
        opened = Project.open(path)
        assert opened.name == "digits"
        assert opened.path.is_absolute()
    assert opened.call("model.build", opened.file.model.build) == "model"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[model]", "[modle]"), "unknown key 'modle'; did you mean 'model'"),
        (("build =", "bild ="), "unknown key 'model.bild'; did you mean 'build'"),
        (("[data]", "[budget]\nmax_dorp = 1.0\n[data]"), "unknown key 'budget.max_dorp'; did you mean 'max_drop'"),
        (("[data]", "[preprocess.image]\nreisze = 3\n[data]"), "'preprocess.image.reisze'; did you mean 'resize'"),
        (("validation =", "# validation ="), "missing required field `validation`"),
        (('name = "digits"', ""), "missing required field `name`"),
        (('"digits"', "3"), "Expected `str`, got `int`"),
        (('"digits"', '"Bad Name"'), "must be 1 to 64 of a-z"),
        (('"digits"', '"../digits"'), "must be 1 to 64 of a-z"),
        (('"digits"', '"digits'), "not valid TOML"),
        (("[data]", "[model]\n[data]"), "not valid TOML"),
        (("[data]", "[budget]\nmax_drop = 'x'\n[data]"), "Expected `float`, got `str`"),
        (("[data]", "[budget]\nmax_drop = nan\n[data]"), "max_drop must be a finite number"),
        (("[data]", "[budget]\nmin_metric = inf\n[data]"), "min_metric must be a finite number"),
        (("[data]", "[budget]\nminimize = []\n[data]"), "at least one of"),
        (("[data]", "[budget]\nminimize = ['speed']\n[data]"), "Invalid enum value 'speed'"),
        (("[data]", "[budget]\ntime_limit = '20 minutes'\n[data]"), "time_limit must be like"),
        (("[data]", "[budget]\ntime_limit = 20\n[data]"), "Expected `str | null`, got `int`"),
        (("[data]", "[preprocess.image]\ncrop = 999\n[data]"), "image preprocessing needs"),
        (("[data]", "[preprocess.image]\nmode = 'CMYK'\n[data]"), "Invalid enum value 'CMYK'"),
        (("[data]", "[task]\nclasses = 'a'\n[data]"), "Expected `array`, got `str`"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_bad_file_is_an_error_that_names_file_key_and_remedy(project, change, said):
    place = project(GOOD.replace(*change))
    message = problem(lambda: Project.open(place))
    assert said in message
    assert "fettle.toml" in message


def test_a_file_that_is_not_there_or_no_text(project, tmp_path):
    assert "does not exist" in problem(lambda: Project.open(tmp_path / "nowhere"))
    place = project()
    (place / "fettle.toml").write_bytes(b'name = "\xff\xfe"')
    assert "not valid TOML" in problem(lambda: Project.open(place))


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("made_model:biuld", "made_model has no callable 'biuld'; did you mean 'build'"),
        ("made_model:CONSTANT", "has no callable 'CONSTANT'"),
        ("nowhere:build", "no file nowhere.py beside fettle.toml"),
        ("made_model.deeper:build", "made_model.deeper"),
        ("made_model", 'must be "module:function"'),
        ("made_model:", 'must be "module:function"'),
        (":build", 'must be "module:function"'),
        ("made_model:build:x", 'must be "module:function"'),
        ("made_model:build()", 'must be "module:function"'),
        ("../made_model:build", 'must be "module:function"'),
        ("", 'must be "module:function"'),
    ],
)
def test_a_reference_to_nothing_says_so(project, reference, said):
    opened = Project.open(project())
    message = problem(lambda: opened.resolve("model.build", reference))
    assert said in message
    assert f'model.build = "{reference}"' in message


@pytest.mark.parametrize(
    ("function", "said"),
    [("fails", "calling it raised ValueError: no weights here"), ("needs", "module_that_nobody_has")],
)
def test_a_callable_that_raises_is_named_with_its_reason(project, function, said):
    opened = Project.open(project())
    message = problem(lambda: opened.call("model.build", f"made_model:{function}"))
    assert said in message
    assert "model.build" in message


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("import module_that_nobody_has", "needs the module 'module_that_nobody_has', which is not installed"),
        ("raise RuntimeError('broken weights')", "importing it raised RuntimeError: broken weights"),
        ("def build(:", "importing it raised SyntaxError"),
        ("from os import no_such_thing", "importing it raised ImportError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_reason(project, module, said):
    opened = Project.open(project(module=module))
    assert said in problem(lambda: opened.resolve("model.build", "made_model:build"))


def test_two_projects_with_modules_of_one_name_keep_their_own(project):
    first = Project.open(project(module="def build(): return 'first'", folder="one"))
    second = Project.open(project(module="def build(): return 'second'", folder="two"))
    for _ in range(2):
        assert first.call("model.build", "made_model:build") == "first"
        assert second.call("model.build", "made_model:build") == "second"


def test_the_search_path_is_left_as_it_was(project):
    before = list(sys.path)
    opened = Project.open(project())
    opened.call("model.build", "made_model:build")
    problem(lambda: opened.call("model.build", "made_model:fails"))
    assert sys.path == before
