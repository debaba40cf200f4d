"""How a model's requests are shared, as it is declared: what cannot be meant is refused before anything starts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.serve.source import FolderSource
from fettle.serve.traffic import Sticky, Traffic, Variant, declared


def source(version=1, name="tiny"):
    return FolderSource(name, Path("somewhere"), version)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), -float("inf")])
def test_a_weight_must_be_a_positive_number(weight):
    with pytest.raises(UsageError, match=f"positive number, got {weight}"):
        Variant(source(), weight)


def test_variants_have_one_name_and_different_labels():
    with pytest.raises(UsageError, match="one name, got cats, tiny"):
        Traffic((Variant(source()), Variant(source(name="cats"))))
    with pytest.raises(UsageError, match="one name, got cats, tiny"):
        Traffic((Variant(source()),), shadow=source(name="cats"))
    with pytest.raises(UsageError, match="label of its own, got a, a"):
        Traffic((Variant(source(1), label="a"), Variant(source(2), label="a")))
    with pytest.raises(UsageError, match="at least one variant"):
        Traffic(())


def test_labels_are_places_by_default():
    traffic = Traffic((Variant(source(1)), Variant(source(2), label="new"), Variant(source(3))))
    assert [one.label for one in traffic.variants] == ["1", "new", "3"]


def test_one_model_or_several_may_be_declared():
    one = Traffic((Variant(source()),))
    assert declared(source()) == declared(one) == declared([source()]) == (one,)
    assert [traffic.name for traffic in declared([source(), source(name="cats")])] == ["tiny", "cats"]
    with pytest.raises(UsageError, match="at least one model"):
        declared([])
    with pytest.raises(UsageError, match="once, got tiny twice"):
        declared([source(1), source(2)])


@pytest.mark.parametrize("text", ["", "ip", "header", "header:", "header:a b", "cookie:", "cookie:a;b", "payload:x"])
def test_sticky_is_a_header_a_cookie_or_the_payload(text):
    with pytest.raises(UsageError, match="sticky"):
        Sticky.parse(text)


@pytest.mark.parametrize("text", ["header:X-User-Id", "cookie:session", "payload"])
def test_sticky_is_written_as_it_is_read(text):
    assert str(Sticky.parse(text)) == text


def test_the_key_is_the_headers_value_and_missing_where_that_is_empty():
    sticky = Sticky.parse("header:X-User-Id")
    assert sticky.key_of({"x-user-id": "ann"}, b"") == b"ann"
    assert sticky.key_of({"x-user-id": ""}, b"") is None
    assert sticky.key_of({}, b"body") is None


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("session=a1", b"a1"),
        ("theme=dark; session=a1; x=y", b"a1"),
        ("theme=dark;session=a1", b"a1"),
        ("session=a=b", b"a=b"),
        ("mysession=a1", None),
        ("session=", None),
        ("session", None),
        (";;==;", None),
        ("", None),
    ],
)
def test_the_key_is_one_cookies_value(header, key):
    assert Sticky.parse("cookie:session").key_of({"cookie": header}, b"") == key


@given(first=st.binary(max_size=2000), second=st.binary(max_size=2000))
def test_the_payloads_key_tells_payloads_apart(first, second):
    keys = [Sticky("payload").key_of({}, body) for body in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


def test_of_a_large_payload_the_ends_and_the_length_count():
    whole = bytearray(2**20)
    keys = {Sticky("payload").key_of({}, bytes(whole))}
    for place in (0, 1000, 2**20 - 1):
        whole[place] = 1
        keys.add(Sticky("payload").key_of({}, bytes(whole)))
    keys.add(Sticky("payload").key_of({}, bytes(whole) + b"\0"))
    assert len(keys) == 5
