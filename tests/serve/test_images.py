"""Preprocessing against Pillow, against a slow reference that resamples pixel by pixel, and the limits."""

import base64
import binascii
import io
import itertools
import math
import struct
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fettle.core.signature import ImagePreprocess
from fettle.serve import images
from fettle.serve.images import FORMATS, MAX_SCANS, decode_base64, preprocess, preprocess_into, resized
from fettle.serve.refusal import Refusal

SPEC = ImagePreprocess(mode="RGB", resize=16, crop=12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


SAME_SIZE = ImagePreprocess(mode="RGB", resize=16, crop=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
GRAY = ImagePreprocess(mode="L", resize=16, crop=16, mean=(0.5,), std=(0.25,))


def encode(pixels, kind="PNG", mode=None, **options):
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def noise(width, height):
    """Color noise, uint8 of shape (height, width, 3): every pixel counts, and chroma runs over its range."""
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(content, spec):
    """The whole image decoded, converted, resized and then cropped by Pillow. Raises what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        target = resized(image.size, spec.resize)
        assert max(math.prod(image.size), math.prod(target)) <= 10**6
        image = image.convert(spec.mode)
    image = image.resize(target, Image.Resampling.BILINEAR)
    left, top = (round((side - spec.crop) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + spec.crop, top + spec.crop)))
    channels = pixels.reshape(spec.crop, spec.crop, -1).transpose(2, 0, 1).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
    return (channels / np.float32(255) - mean) / std


def assert_as_pillow(content, spec):
    """The same numbers bit for bit, or refused exactly where Pillow refuses; returns whether it was refused."""
    try:
        expected = by_pillow(content, spec)
    except Exception:
        with pytest.raises(Refusal) as caught:
            preprocess(content, spec, max_pixels=10**6)
        assert caught.value.status in (400, 413)
        return True
    np.testing.assert_array_equal(preprocess(content, spec, max_pixels=10**6)[0], expected)
    return False


def triangle_weights(length, target):
    """Antialiased bilinear resampling of one axis as a matrix: a triangle as wide as the step, at least one pixel."""
    scale = length / target
    support = max(scale, 1.0)
    matrix = np.zeros((target, length))
    for i in range(target):
        center = (i + 0.5) * scale
        for j in range(max(0, int(center - support + 0.5)), min(length, int(center + support + 0.5))):
            matrix[i, j] = max(0.0, 1 - abs((j + 0.5 - center) / support))
        matrix[i] /= matrix[i].sum()
    return matrix


def reference(pixels, spec):
    """Resize, crop, scale and normalize in float64, written out."""
    height, width, _ = pixels.shape
    short = min(height, width)
    new_height, new_width = (
        (spec.resize, int(spec.resize * width / height))
        if height == short
        else (int(spec.resize * height / width), spec.resize)
    )
    rows, columns = triangle_weights(height, new_height), triangle_weights(width, new_width)
    image = np.einsum("ih,hwc,jw->ijc", rows, pixels.astype(np.float64), columns)
    top, left = round((new_height - spec.crop) / 2), round((new_width - spec.crop) / 2)
    image = image[top : top + spec.crop, left : left + spec.crop] / 255
    image = (image - np.array(spec.mean)) / np.array(spec.std)
    return image.transpose(2, 0, 1)[None]


@pytest.mark.parametrize("size", [(16, 16), (20, 16), (16, 33), (40, 25), (7, 9), (100, 31), (12, 200), (1, 1)])
def test_agrees_with_the_reference(size):
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    row = preprocess(encode(pixels), SPEC, max_pixels=10**6)
    assert row.shape == (1, 3, 12, 12)
    assert row.dtype == np.float32
    # Pillow rounds to whole pixel values after each axis: at most about one step of 1/255, over the smallest std.
    np.testing.assert_allclose(row, reference(pixels, SPEC), atol=1.2 / 255 / 0.2)


def test_is_exact_where_nothing_is_resized():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (SAME_SIZE.mean, SAME_SIZE.std))
    expected = (pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std
    np.testing.assert_array_equal(preprocess(encode(pixels), SAME_SIZE, max_pixels=10**6)[0], expected)


EXIF = Image.Exif()
EXIF[0x0112] = 6  # Orientation: turn by 90°.
JPEGS = {
    "plain": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "poor": {"quality": 5},
    "rich": {"quality": 100},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 1},
    "RGB inside": {"keep_rgb": True},
    "comment": {"comment": b"\xff\xd9 is no end here"},
    "profile": {"icc_profile": bytes(range(256)) * 300},
    "turned": {"exif": EXIF},
    "gray": {"mode": "L"},
    "gray progressive": {"mode": "L", "progressive": True},
    "CMYK": {"mode": "CMYK"},
}


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (64, 48), (31, 77), (5, 9), (1, 1)])
@pytest.mark.parametrize("spec", [SPEC, SAME_SIZE, GRAY], ids=["crop", "same size", "gray"])
@pytest.mark.parametrize("kind", JPEGS)
def test_every_kind_of_jpeg_is_what_pillow_makes_of_it(kind, spec, size):
    assert not assert_as_pillow(encode(noise(*size), "JPEG", **JPEGS[kind]), spec)


@pytest.mark.parametrize("kind", [kind for kind in JPEGS if kind != "CMYK"])
def test_an_undamaged_jpeg_never_needs_pillow(kind, monkeypatch):
    monkeypatch.setattr(images, "_pillow", lambda *_: pytest.fail("decoded by Pillow"))
    for spec in (SPEC, SAME_SIZE, GRAY):
        preprocess(encode(noise(33, 17), "JPEG", **JPEGS[kind]), spec, max_pixels=10**6)


def test_orientation_is_not_applied():
    turned, plain = (encode(noise(33, 17), "JPEG", **JPEGS[kind]) for kind in ("turned", "plain"))
    np.testing.assert_array_equal(preprocess(turned, SPEC, max_pixels=10**6), preprocess(plain, SPEC, max_pixels=10**6))


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    kind=st.sampled_from(["JPEG", "PNG"]),
    quality=st.integers(1, 100),
    mode=st.sampled_from(["RGB", "L"]),
    model_mode=st.sampled_from(["RGB", "L"]),
    resize=st.sampled_from([8, 15, 16, 31, 32, 48]),
    margin=st.integers(0, 7),
)
def test_any_size_and_geometry_is_what_pillow_makes_of_it(size, kind, quality, mode, model_mode, resize, margin):
    values = (0.25,) * len(model_mode)
    spec = ImagePreprocess(mode=model_mode, resize=resize, crop=resize - margin, mean=values, std=values)
    assert not assert_as_pillow(encode(noise(*size), kind, mode=mode, quality=quality), spec)


@pytest.mark.parametrize("kind", ["plain", "progressive", "restart markers", "comment", "gray", "CMYK"])
def test_a_truncated_jpeg_is_refused_where_pillow_refuses(kind):
    content = encode(noise(40, 30), "JPEG", **JPEGS[kind])
    refused = [assert_as_pillow(content[:end], SPEC) for end in range(0, len(content), 10)]
    assert all(refused[:-1])
    assert_as_pillow(content[:-1], SPEC)  # Pillow lets the end marker be missing where all pixels are there.


def test_what_libjpeg_only_warns_of_is_served():
    content = encode(noise(40, 30), "JPEG")
    tables = content.index(b"\xff\xdb")
    junk = content[:tables] + b"junk" + content[tables:]
    with pytest.raises(ValueError, match="xtraneous bytes"):
        simplejpeg.decode_jpeg(junk)
    for odd in (junk, content + b"trailing garbage", content[:tables] + b"\xff" * 9 + content[tables:]):
        assert not assert_as_pillow(odd, SPEC)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_jpeg_is_refused_where_pillow_refuses(data):
    kind = data.draw(st.sampled_from(["plain", "progressive", "restart markers", "gray"]))
    content = bytearray(encode(noise(24, 20), "JPEG", **JPEGS[kind]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert_as_pillow(bytes(content), SPEC)


@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"\x89PNG\r\n"]),
    st.binary(max_size=100),
)
def test_garbage_is_refused(start, rest):
    with pytest.raises(Refusal) as caught:
        preprocess(start + rest, SPEC, max_pixels=2**32)
    assert caught.value.status == 400


@given(width=st.integers(1, 10_000), height=st.integers(1, 10_000), shorter=st.integers(1, 512))
def test_resized_keeps_the_shorter_side_and_the_ratio(width, height, shorter):
    new = resized((width, height), shorter)
    assert min(new) == shorter
    assert math.isclose(max(new), shorter * max(width, height) / min(width, height), abs_tol=1)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_the_declared_one(mode):
    file = io.BytesIO()
    kind = "JPEG" if mode == "CMYK" else "PNG"
    Image.new(mode, (20, 20)).save(file, kind)
    assert preprocess(file.getvalue(), SPEC, max_pixels=10**6).shape == (1, 3, 12, 12)


def test_a_palette_with_transparency():
    file = io.BytesIO()
    Image.new("P", (20, 20)).save(file, "PNG", transparency=bytes([0, 128]))
    assert preprocess(file.getvalue(), SPEC, max_pixels=10**6).shape == (1, 3, 12, 12)


def test_gray_models():
    spec = ImagePreprocess(mode="L", resize=8, crop=8, mean=(0.5,), std=(0.5,))
    row = preprocess(encode(np.full((8, 8, 3), 255, np.uint8)), spec, max_pixels=10**6)
    np.testing.assert_array_equal(row, np.ones((1, 1, 8, 8), np.float32))


def test_the_limit_is_inclusive():
    content = encode(np.zeros((10, 10, 3), np.uint8))
    preprocess(content, SPEC, max_pixels=100)
    with pytest.raises(Refusal, match="at most 99 pixels, got 10×10") as caught:
        preprocess(content, SPEC, max_pixels=99)
    assert caught.value.status == 413


def test_a_decompression_bomb_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_: pytest.fail("decoded"))
    content = bytearray(encode(noise(20, 20), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (65_000).to_bytes(2, "big") * 2
    with pytest.raises(Refusal, match="at most 25000000 pixels, got 65000×65000") as caught:
        preprocess(bytes(content), SPEC, max_pixels=25_000_000)
    assert caught.value.status == 413


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_long_thin_image_is_refused(size, kind):
    with pytest.raises(Refusal, match="long and thin") as caught:
        preprocess(encode(noise(*size), kind), SPEC, max_pixels=10_000)
    assert caught.value.status == 400


def test_a_jpeg_of_very_many_scans_is_refused():
    content = encode(noise(32, 32), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    bomb = content[:-2] + scan * MAX_SCANS + content[-2:]
    with pytest.raises(Refusal, match=f"a JPEG may have at most {MAX_SCANS} scans, got") as caught:
        preprocess(bomb, SPEC, max_pixels=10**6)
    assert caught.value.status == 400


def test_bytes_that_look_like_scans_are_no_scans():
    content = encode(noise(32, 32), "JPEG", comment=b"\xff\xda" * 30_000)
    assert len(content) > 60_000
    assert not assert_as_pillow(content, SPEC)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_one_row_of_a_batch_is_filled_from_a_view(kind):
    content = encode(noise(20, 24), kind)
    batch = np.full((3, 3, 12, 12), 7, np.float32)
    preprocess_into(memoryview(content), SPEC, batch[1], max_pixels=10**6)
    np.testing.assert_array_equal(batch[1], by_pillow(content, SPEC))
    with pytest.raises(Refusal):
        preprocess_into(memoryview(content)[:-100], SPEC, batch[0], max_pixels=10**6)
    assert (batch[[0, 2]] == 7).all()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damage_crashes_or_hangs(data):
    content = bytearray(encode(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        shape = preprocess(bytes(content), SPEC, max_pixels=10**5).shape
    except Refusal as refusal:
        shape = refusal.status
    assert shape in ((1, 3, 12, 12), 400, 413)


@given(st.binary(max_size=200))
def test_base64_round_trip(content):
    text = base64.b64encode(content)
    for start in (b"", b"data:image/jpeg;base64,"):
        sent = start + text
        assert decode_base64(sent.decode()) == decode_base64(sent) == decode_base64(memoryview(sent)) == content


def test_base64_is_as_strict_as_the_standard_library():
    for length in range(6):
        for letters in itertools.product(b"aB+=-\n\xe9", repeat=length):
            sent = bytes(letters)
            try:
                expected = base64.b64decode(sent, validate=True)
            except binascii.Error:
                expected = None
            try:
                assert decode_base64(sent) == expected
            except Refusal:
                # Padding where there is nothing to pad, which b64decode lets pass on some versions of Python.
                assert expected is None or sent.endswith(b"=")


@pytest.mark.parametrize(
    "text", ["a", "ab=", "a b=", "é===", "data:image/png,abcd", "data:x", "https://x/y.png", "FILE:///x"]
)
def test_bad_base64(text):
    for sent in (text, text.encode(), memoryview(text.encode())):
        with pytest.raises(Refusal) as caught:
            decode_base64(sent)
        assert caught.value.status == 400


def pieces(kind):
    """Two megabytes of the smallest pieces that a file may be made of, and what a file has of its own around them."""
    jpeg = encode(noise(8, 8), "JPEG")
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(8 * 25))
    count = 2**21
    return {
        "segments": b"\xff\xd8" + b"\xff\xe1\x00\x02" * (count // 4) + jpeg[2:-30],
        "fill bytes": b"\xff\xd8" + b"\xff" * count + jpeg[3:-30],
        "junk": b"\xff\xd8\xff\xe0\x00\x02" + bytes(count) + jpeg[2:-30],
        "chunks": header + chunk(b"abCd", b"") * (count // 12) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""),
        "empty pixels": header + chunk(b"IDAT", b"") * (count // 12) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""),
        "chunks at the end": header
        + chunk(b"IDAT", pixels)
        + chunk(b"abCd", b"") * (count // 12)
        + chunk(b"IEND", b""),
    }[kind]


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize("kind", ["segments", "fill bytes", "junk", "chunks", "empty pixels", "chunks at the end"])
def test_a_file_of_very_many_small_pieces_is_refused(kind, monkeypatch):
    """Sixteen megabytes of them kept a worker busy for many seconds."""
    reads = Counter()

    class Counted(images._Rationed):
        def read(self, size=-1, /):
            reads[kind] += 1
            return super().read(size)

    monkeypatch.setattr(images, "_Rationed", Counted)
    with pytest.raises(Refusal, match="so many small pieces") as caught:
        preprocess(pieces(kind), SPEC, max_pixels=10**6)
    assert caught.value.status == 400
    assert reads[kind] < 15_000


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_color_profile_and_many_texts_are_no_reason_to_refuse(kind):
    options = {"icc_profile": bytes(16_000_000)}
    if kind == "PNG":
        texts = PngInfo()
        for number in range(300):
            texts.add_text(f"t{number}", "x")
        options = {"icc_profile": bytes(900_000), "pnginfo": texts}
    content = encode(noise(400, 300), kind, **options)
    np.testing.assert_array_equal(preprocess(content, SPEC, max_pixels=10**6)[0], by_pillow(content, SPEC))
    images.decode_image(content, max_pixels=10**6).load()
