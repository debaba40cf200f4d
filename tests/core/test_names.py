from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import ProjectError, UsageError
from fettle.core.names import Reference, check_name

GOOD = ["a", "0", "a-b", "a.b", "a_b", "cifar-resnet20", "x" * 64]
BAD = [
    "", "-a", "a-", ".a", "a.", "_a", "a_", "A", "a b", "a/b", "../a", "a..b", "a\n", "é", "a:b", "a@b", "x" * 65,
    "\x00", "a\\b",
]  # fmt: skip

names = st.from_regex(r"[a-z0-9](?:[a-z0-9_-]{0,20}[a-z0-9])?", fullmatch=True)


@pytest.mark.parametrize("name", GOOD)
def test_good_names_are_returned(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused_with_the_rule_and_the_value(name):
    with pytest.raises(ProjectError, match="a model name must be 1 to 64") as caught:
        check_name(name, what="a model name", error=ProjectError)
    assert repr(name) in str(caught.value)


@given(names, st.none() | names, st.none() | st.integers(1, 999_999_999))
def test_a_reference_survives_its_text(name, alias, version):
    reference = Reference(name, alias, None if alias else version)
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@a",
        ":1",
        "a@",
        "a:",
        "a:0",
        "a:-1",
        "a:x",
        "a:1.5",
        "a@b:1",
        "a:1@b",
        "a@b@c",
        "a:01",
        "a:1234567890",
        "A@b",
        "a@B",
        "a\n@b",
        "a:1\n",
    ],
)
def test_bad_references_are_refused(text):
    with pytest.raises(UsageError):
        Reference.parse(text)
