"""From the bytes of an image file to one row of the model's input, as the artifact's signature declares it.

What comes out is, bit for bit, torchvision's `Resize(n)`, `CenterCrop(m)`, `ToTensor()`, `Normalize(mean, std)` on
images of the same Pillow, so that a model trained with those sees the same numbers here, without torch. EXIF
orientation is not applied, as there.

JPEGs are decoded by libjpeg-turbo without Pillow around it, which costs tens of microseconds an image. Two faster
ways are not taken, because they change pixels: decoding at a reduced scale (most of them, by up to 11 of 255 levels),
and resizing only what the crop keeps (some, by one level: Pillow's order of passes depends on the size, and it holds
the edges in float32).
"""

from __future__ import annotations

import binascii
import io
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import Image

from fettle.core.signature import Array, ImagePreprocess
from fettle.serve.refusal import Refusal

# Every further decoder is attack surface; these four are what phones, browsers and cameras send.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# A progressive JPEG can hold one more scan over all its pixels in 31 bytes: a megabyte of them decodes for minutes.
# Cameras and browsers write about ten; the rest is room for bytes that only look like scans, such as in a profile.
MAX_SCANS = 100
_MANY_SCANS_BYTES = 2048
_MAX_SEGMENTS = 200
# Pillow reads headers in Python, a few bytes at a time: megabytes of empty JPEG segments, of PNG chunks or of fill
# bytes take it many seconds. The largest profile a JPEG can hold is 255 segments, of four reads each.
_HEADER_READS = 1500
# Pixels come in pieces of some kilobytes, in PNG files of four reads each.
_BYTES_A_READ = 256
_JPEG = b"\xff\xd8\xff"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = (0xC0, 0xC1)
_DATA_URL_HEAD = 256
_255 = np.float32(255)


def decode_base64(text: str | bytes | memoryview) -> bytes:
    """The bytes behind base64 text, with or without a "data:image/png;base64," prefix. Raises Refusal 400.

    >>> decode_base64("data:image/png;base64,aGk=")
    b'hi'
    >>> decode_base64(memoryview(b"aGk="))
    b'hi'
    """
    head = text[:_DATA_URL_HEAD] if isinstance(text, str) else str(text[:_DATA_URL_HEAD], "latin-1")
    if head.startswith("data:"):
        kind, comma, _ = head.partition(",")
        if not comma or not kind.endswith(";base64"):
            raise Refusal(400, 'a data URL must be like "data:image/png;base64,..."')
        text = text[len(kind) + 1 :]
    elif head[:8].lower().startswith(("http://", "https://", "file://")):
        raise Refusal(400, "an image must be sent as base64 text, got a URL: the server never fetches URLs")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # binascii.Error is one, and so is what text beyond ASCII raises.
        raise Refusal(400, "an image in JSON must be standard base64 text, got something else") from None


def resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Width and height when the shorter side becomes `shorter`; the longer one is cut to an integer, as torchvision.

    >>> resized((640, 480), 256)
    (341, 256)
    """
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def preprocess(content: bytes | memoryview, spec: ImagePreprocess, *, max_pixels: int) -> Array:
    """One row, float32 of shape (1, channels, crop, crop), as `preprocess_into` fills it. Raises Refusal 400 or 413."""
    row = np.empty((1, *spec.shape), np.float32)
    preprocess_into(content, spec, row[0], max_pixels=max_pixels)
    return row


def preprocess_into(content: bytes | memoryview, spec: ImagePreprocess, out: Array, *, max_pixels: int) -> None:
    """Fill `out`, float32 of shape (channels, crop, crop), with ((pixel / 255) - mean) / std.

    The three steps are rounded one by one in float32, as torchvision's are: equal to it, not close to it. One
    multiplication and one addition would save less than 1 µs on 32×32 pixels, and be off by up to 5e-7.

    content: an image file; spec: from the artifact's signature; max_pixels: width × height of the largest image.
    Raises Refusal 400, or 413 if too large; `out` is then as it was.
    """
    pixels = _turbo(content, spec, max_pixels) if content[:3] == _JPEG else None
    if pixels is None:
        pixels = _pillow(content, spec, max_pixels)
    mean, std = _moments(spec)
    out[...] = pixels.transpose(2, 0, 1)
    np.divide(out, _255, out=out)
    np.subtract(out, mean, out=out)
    np.divide(out, std, out=out)


@lru_cache
def _moments(spec: ImagePreprocess) -> tuple[Array, Array]:
    """Mean and standard deviation, each float32 of shape (channels, 1, 1)."""
    return np.array(spec.mean, np.float32)[:, None, None], np.array(spec.std, np.float32)[:, None, None]


def _turbo(content: bytes | memoryview, spec: ImagePreprocess, max_pixels: int) -> Array | None:
    """Pixels of a JPEG, uint8 of shape (crop, crop, channels); None where it is Pillow's to decode or to refuse.

    simplejpeg refuses what libjpeg warns of, truncation and harmless oddities alike: Pillow then tells them apart.
    """
    _check_scans(content)
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(content)
    except Exception:
        return None
    if color in ("CMYK", "YCCK"):
        return None
    _check_size((width, height), max_pixels)
    target = _target((width, height), spec, max_pixels)
    try:
        # libjpeg's gray of a color file is its luma, Pillow's comes from red, green and blue: up to 43 levels apart.
        if target == (width, height) and (spec.mode == "RGB" or color == "Gray"):
            pixels = simplejpeg.decode_jpeg(content, "RGB" if spec.mode == "RGB" else "GRAY")
            left, top = _corner(target, spec)
            return pixels[top : top + spec.crop, left : left + spec.crop]  # type: ignore[no-any-return]
        import pyarrow as pa  # here, for a worker that never resizes needs none of its 50 MB

        # Four bytes a pixel are how Pillow stores RGB, so that it can use this memory as it is.
        pixels = simplejpeg.decode_jpeg(content, "RGBX")
        return _fitted(Image.fromarrow(pa.array(pixels.reshape(-1)), "RGB", (width, height)), target, spec)
    except Exception:
        return None


def _pillow(content: bytes | memoryview, spec: ImagePreprocess, max_pixels: int) -> Array:
    """Pixels of any image, uint8 of shape (crop, crop, channels). Raises Refusal 400 or 413."""
    image = decode_image(content, max_pixels=max_pixels)
    target = _target(image.size, spec, max_pixels)
    try:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns where a transparent palette goes to RGB in one step.
        return _fitted(image, target, spec)
    except Refusal:
        raise
    except Exception:
        raise Refusal(400, f"the {image.format} image cannot be decoded: truncated or damaged") from None


def decode_image(content: bytes | memoryview, *, max_pixels: int) -> Image.Image:
    """The first frame of an image file, not yet decoded beyond its header. Raises Refusal 400, or 413 if too large.

    The size is read from the header, so that a decompression bomb costs nothing.
    """
    if not content:
        raise Refusal(400, "an image must not be empty")
    file = _Rationed(content, _HEADER_READS)
    try:
        image = Image.open(file, formats=FORMATS)
    except Refusal:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refusal(413, f"an image may have at most {max_pixels} pixels, got more") from None
    except Exception:
        raise Refusal(400, f"an image must be a {', '.join(FORMATS)} file, got something else") from None
    _check_size(image.size, max_pixels)
    file.reads_left = _HEADER_READS + len(content) // _BYTES_A_READ
    return image


class _Rationed(io.BytesIO):
    """A file that may be read only so many times: what takes more is made to take long. Raises Refusal 400."""

    def __init__(self, content: bytes | memoryview, reads: int) -> None:
        super().__init__(content)
        self.reads_left = reads

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise Refusal(400, "an image file must not be cut into so many small pieces")
        return super().read(size)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise Refusal(400, f"an image must have pixels, got {width}×{height}")
    if width * height > max_pixels:
        raise Refusal(413, f"an image may have at most {max_pixels} pixels, got {width}×{height}")


def _target(size: tuple[int, int], spec: ImagePreprocess, max_pixels: int) -> tuple[int, int]:
    """Width and height after resizing. Raises Refusal 400 where a long, thin image would become huge."""
    target = resized(size, spec.resize)
    if target[0] * target[1] > max(max_pixels, spec.resize**2):
        raise Refusal(400, f"an image must not be so long and thin, got {size[0]}×{size[1]}")
    return target


def _check_scans(content: bytes | memoryview) -> None:
    """Raise Refusal 400 for a JPEG that would be decoded for far longer than its size tells.

    Counting takes as long as a tenth of the decoding; files too short for it or not progressive are spared it.
    """
    if len(content) < _MANY_SCANS_BYTES or not _may_be_progressive(content):
        return
    scans = bytes(content).count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise Refusal(400, f"a JPEG may have at most {MAX_SCANS} scans, got {scans}")


def _may_be_progressive(content: bytes | memoryview) -> bool:
    """Whether the first frame of a JPEG is another than sequential, or its header is odd enough not to tell."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if at + 4 > len(content) or content[at] != 0xFF:
            break
        if content[at + 1] in _FRAMES:
            return content[at + 1] not in _SEQUENTIAL
        at += 2 + (content[at + 2] << 8 | content[at + 3])
    return True


def _fitted(image: Image.Image, target: tuple[int, int], spec: ImagePreprocess) -> Array:
    """Convert, resize and crop with Pillow: uint8 of shape (crop, crop, channels)."""
    if image.mode != spec.mode:  # Pillow would copy it.
        image = image.convert(spec.mode)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BILINEAR)
    if target != (spec.crop, spec.crop):
        left, top = _corner(target, spec)
        image = image.crop((left, top, left + spec.crop, top + spec.crop))
    return np.asarray(image).reshape(spec.crop, spec.crop, len(spec.mode))


def _corner(size: tuple[int, int], spec: ImagePreprocess) -> tuple[int, int]:
    """Left and top of the central square, rounded as torchvision does."""
    return round((size[0] - spec.crop) / 2), round((size[1] - spec.crop) / 2)
