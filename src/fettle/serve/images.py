"""From the bytes of an image file to one row of the model's input, as the artifact's signature declares it.

The geometry is torchvision's `Resize(n)`, `CenterCrop(m)`, `ToTensor()`, `Normalize(mean, std)` on Pillow images, so
that a model trained with those sees the same pixels here, without torch. EXIF orientation is not applied, as there.
"""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from PIL import Image

from fettle.core.signature import Array, ImagePreprocess
from fettle.serve.refusal import Refusal

# Every further decoder is attack surface; these four are what phones, browsers and cameras send.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def decode_base64(text: str) -> bytes:
    """The bytes behind base64 text, with or without a "data:image/png;base64," prefix. Raises Refusal 400.

    >>> decode_base64("data:image/png;base64,aGk=")
    b'hi'
    """
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Refusal(400, 'a data URL must be like "data:image/png;base64,..."')
    elif text[:8].lower().startswith(("http://", "https://", "file://")):
        raise Refusal(400, "an image must be sent as base64 text, got a URL: the server never fetches URLs")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, "an image in JSON must be standard base64 text, got something else") from None


def decode_image(content: bytes, *, max_pixels: int) -> Image.Image:
    """The first frame of an image file, not yet decoded beyond its header. Raises Refusal 400, or 413 if too large.

    The size is read from the header, so that a decompression bomb costs nothing.
    """
    if not content:
        raise Refusal(400, "an image must not be empty")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refusal(413, f"an image may have at most {max_pixels} pixels, got more") from None
    except Exception:
        raise Refusal(400, f"an image must be a {', '.join(FORMATS)} file, got something else") from None
    width, height = image.size
    if width < 1 or height < 1:
        raise Refusal(400, f"an image must have pixels, got {width}×{height}")
    if width * height > max_pixels:
        raise Refusal(413, f"an image may have at most {max_pixels} pixels, got {width}×{height}")
    return image


def resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Width and height when the shorter side becomes `shorter`; the longer one is cut to an integer, as torchvision.

    >>> resized((640, 480), 256)
    (341, 256)
    """
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def preprocess(content: bytes, spec: ImagePreprocess, *, max_pixels: int) -> Array:
    """One row, float32 of shape (1, channels, crop, crop): ((pixel / 255) - mean) / std.

    content: an image file; spec: from the artifact's signature. Raises Refusal 400 or 413.
    """
    image = decode_image(content, max_pixels=max_pixels)
    target = resized(image.size, spec.resize)
    if target[0] * target[1] > max(max_pixels, spec.resize**2):
        raise Refusal(400, f"an image must not be so long and thin, got {image.size[0]}×{image.size[1]}")
    try:
        pixels = _pixels(image, target, spec)
    except Exception:
        raise Refusal(400, f"the {image.format} image cannot be decoded: truncated or damaged") from None
    channels = pixels.transpose(2, 0, 1).astype(np.float32)
    mean = np.array(spec.mean, np.float32)[:, None, None]
    std = np.array(spec.std, np.float32)[:, None, None]
    channels /= np.float32(255)
    channels -= mean
    channels /= std
    return channels[np.newaxis]


def _pixels(image: Image.Image, target: tuple[int, int], spec: ImagePreprocess) -> Array:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where a transparent palette goes to RGB in one step.
    image = image.convert(spec.mode)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BILINEAR)
    left = round((target[0] - spec.crop) / 2)
    top = round((target[1] - spec.crop) / 2)
    image = image.crop((left, top, left + spec.crop, top + spec.crop))
    return np.asarray(image).reshape(spec.crop, spec.crop, len(spec.mode))
