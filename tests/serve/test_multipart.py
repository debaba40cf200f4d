"""The multipart parser: what well-formed clients send, and everything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.serve.multipart import MAX_PARTS, boundary_of, files_in
from fettle.serve.refusal import Refusal


def part(content, *, headers=None):
    headers = headers or 'Content-Disposition: form-data; name="image"; filename="a.png"'
    return headers.encode() + b"\r\n\r\n" + content


def form(*parts, boundary=b"xyz", end=b"--\r\n"):
    return b"".join(b"--" + boundary + b"\r\n" + p + b"\r\n" for p in parts) + b"--" + boundary + end


@given(st.lists(st.binary(max_size=300).filter(lambda c: b"\r\n--xyz" not in b"\r\n" + c), max_size=5))
def test_round_trip(contents):
    assert files_in(form(*map(part, contents)), b"xyz") == contents


@given(st.binary(max_size=500))
def test_any_bytes_give_files_or_400(body):
    try:
        status = 200 if isinstance(files_in(b"--xyz" + body, b"xyz"), list) else 500
    except Refusal as refusal:
        status = refusal.status
    assert status in (200, 400)


@pytest.mark.parametrize("end", [b"--", b"--\r\n", b"--\r\n\r\n", b"-- \r\n"])
def test_ends_that_clients_send(end):
    assert files_in(form(part(b"hi"), end=end), b"xyz") == [b"hi"]


@pytest.mark.parametrize(
    "headers",
    [
        'content-disposition: form-data; name="f"; filename="x"',
        'Content-Disposition: form-data; name=""; filename=""',
        "Content-Disposition: form-data; name=\"f\"; filename*=UTF-8''x",
        'Content-Disposition: form-data; filename="x"; name="f"',
        'Content-Disposition: form-data; name="f"\r\nContent-Type: image/png',
        'Content-Type: image/png\r\nContent-Disposition: form-data; name="f"; filename="é"',
        'Content-Disposition: form-data; name="f"; filename="x"\r\nContent-Transfer-Encoding: binary',
    ],
)  # fmt: skip
def test_headers_that_clients_send(headers):
    assert files_in(form(part(b"hi", headers=headers)), b"xyz") == [b"hi"]


@pytest.mark.parametrize(
    "headers",
    [
        "X: y", 'Content-Disposition: attachment; name="f"; filename="x"', 'Content-Disposition: form-data; name="f"',
        'Content-Disposition: form-data; filename="x"',
        'Content-Disposition: form-data; name="f"; filename="x"\r\nContent-Transfer-Encoding: base64',
        'Content-Disposition: form-data; name="f"; filename="x"\r\nX: ' + "y" * 5000,
    ],
)  # fmt: skip
def test_headers_that_are_refused(headers):
    with pytest.raises(Refusal) as caught:
        files_in(form(part(b"hi", headers=headers)), b"xyz")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"--", b"--xy", b"--xyz", b"--xyz\r\n", b"--xyz\r\n\r\n--xyz--", b"preamble\r\n--xyz--",
        b"--xyz--trailing",
        form(part(b"hi"))[:-6], form(part(b"hi"), end=b"\r\n"), form(part(b"hi"), end=b"--\r\n--xyz--"),
    ],
)  # fmt: skip
def test_bodies_that_are_refused(body):
    with pytest.raises(Refusal) as caught:
        files_in(body, b"xyz")
    assert caught.value.status == 400


def test_too_many_parts():
    assert len(files_in(form(*[part(b"x")] * MAX_PARTS), b"xyz")) == MAX_PARTS
    with pytest.raises(Refusal) as caught:
        files_in(form(*[part(b"x")] * (MAX_PARTS + 1)), b"xyz")
    assert caught.value.status == 413


def test_many_almost_boundaries_take_linear_time():
    content = b"\r\n--xy" * 1_000_000
    assert files_in(form(part(content)), b"xyz") == [content]


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ("multipart/form-data;boundary=----WebKitFormBoundary7MA4YWxkTr", b"----WebKitFormBoundary7MA4YWxkTr"),
        ("multipart/form-data; boundary=abc", b"abc"), ('multipart/form-data; boundary="a b:c"', b"a b:c"),
        ("multipart/form-data; charset=utf-8; Boundary=abc; x=y", b"abc"),
    ],
)  # fmt: skip
def test_boundaries(header, boundary):
    assert boundary_of(header) == boundary
