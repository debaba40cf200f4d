"""Preprocessing against a slow reference that resamples pixel by pixel, and the limits."""

import base64
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fettle.core.signature import ImagePreprocess
from fettle.serve.images import decode_base64, preprocess, resized
from fettle.serve.refusal import Refusal

SPEC = ImagePreprocess(mode="RGB", resize=16, crop=12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def encode(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


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
    spec = ImagePreprocess(mode="RGB", resize=16, crop=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
    expected = (pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std
    np.testing.assert_array_equal(preprocess(encode(pixels), spec, max_pixels=10**6)[0], expected)


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
    assert decode_base64(base64.b64encode(content).decode()) == content


@pytest.mark.parametrize(
    "text", ["a", "ab=", "a b=", "é===", "data:image/png,abcd", "data:x", "https://x/y.png", "FILE:///x"]
)
def test_bad_base64(text):
    with pytest.raises(Refusal) as caught:
        decode_base64(text)
    assert caught.value.status == 400
