from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core import codec
from fettle.core.errors import DataError, ForeignArtifact, UsageError
from fettle.core.recipe import Budget, Recipe, StepSpec

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    size: int
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    leaf: Leaf
    leaves: tuple[Leaf, ...] = ()
    maybe: Leaf | None = None
    free: dict[str, int] = field(default_factory=dict)


def read(data, **options):
    return codec.from_json(Tree, data, where="tree.json", **options)


@given(plain)
def test_canonical_text_is_json_and_ignores_the_order_of_keys(value):
    assert json.loads(codec.canonical(value)) == value
    if isinstance(value, dict):
        assert codec.canonical(dict(reversed(value.items()))) == codec.canonical(value)


@given(st.text(min_size=1), st.dictionaries(st.text(), plain, max_size=3), st.integers(0, 2**31))
def test_a_recipe_survives_the_round_trip_and_keeps_its_digest(name, parameters, seed):
    recipe = Recipe(name=name, steps=(StepSpec(name="a.b", parameters=parameters),), budget=Budget(), seed=seed)
    again = codec.from_json(Recipe, json.loads(codec.canonical(recipe)), where="x")
    assert again == recipe
    assert again.digest == recipe.digest


def test_digests_differ_where_values_do():
    digests = {Recipe(name=name, seed=seed).digest for name in "ab" for seed in range(3)}
    assert len(digests) == 6
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"leaf": {"size": 1}, "leef": 1}, r"unknown key 'leef'; did you mean 'leaf'\?"),
        ({"leaf": {"size": 1, "labl": ""}}, r"unknown key 'leaf.labl'; did you mean 'label'\?"),
        (
            {"leaf": {"size": 1}, "leaves": [{"size": 1}, {"sise": 1}]},
            r"unknown key 'leaves.1.sise'; did you mean 'size'",
        ),
        ({"leaf": {"size": 1}, "maybe": {"siz": 1}}, r"unknown key 'maybe.siz'"),
        ({"leaf": {"size": 1}, "zzzzz": 1}, r"unknown key 'zzzzz'\. Known: free, leaf, leaves, maybe"),
        ({"leaf": {"size": 1}, 3: 1}, "unknown key '3'"),
        ({}, "missing required field `leaf`"),
        ({"leaf": {}}, "missing required field `size`"),
        ({"leaf": {"size": "1"}}, "Expected `int`, got `str`"),
        ({"leaf": {"size": 1.5}}, "Expected `int`, got `float`"),
        ({"leaf": {"size": True}}, "Expected `int`, got `bool`"),
        ({"leaf": None}, "Expected `object`, got `null`"),
        ({"leaf": []}, "Expected `object`, got `array`"),
        ({"leaf": {"size": 1}, "free": {"a": "b"}}, "Expected `int`, got `str`"),
        ([], "Expected `object`, got `array`"),
        (None, "Expected `object`, got `null`"),
        ("text", "Expected `object`, got `str`"),
    ],
    ids=str,
)
def test_bad_data_is_an_error_that_says_where(data, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(data)
    assert str(caught.value).startswith("tree.json: ")


@pytest.mark.parametrize("error", [DataError, ForeignArtifact])
def test_the_error_is_the_callers(error):
    for data in ({"lef": 1}, {}):
        with pytest.raises(error):
            read(data, error=error)


def test_free_dictionaries_take_any_key():
    assert read({"leaf": {"size": 1}, "free": {"anything at all": 3}}).free == {"anything at all": 3}


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [("a", [], ". Known: none"), ("crpo", ["crop", "resize"], "; did you mean 'crop'? Known: crop, resize")],
)
def test_nearest(name, known, text):
    assert codec.nearest(name, known) == text


FIRST_TIMES_AT_ONCE = """
import dataclasses, sys, threading
from fettle.core import codec

sys.setswitchinterval(1e-6)
for number in range(80):
    inner = dataclasses.make_dataclass(f"Inner{number}", [("a", int), ("b", "tuple[str, ...]")])
    fields = [("inner", inner), ("c", "int | None"), ("d", "dict[str, int]")]
    outer = dataclasses.make_dataclass(f"Outer{number}", fields)
    barrier = threading.Barrier(4)

    def convert():
        barrier.wait()
        codec.from_json(outer, {"inner": {"a": 1, "b": ["x"]}, "c": None, "d": {}}, where="here")

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("fine")
"""


def test_threads_may_read_the_same_kind_for_the_first_time_at_once():
    """A server of two versions does; in a process of its own, for the failure is a segmentation fault."""
    command = [sys.executable, "-c", FIRST_TIMES_AT_ONCE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
