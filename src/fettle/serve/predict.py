"""`POST /predict`, as the front sees it: images in, for people and programs that speak no tensor protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from fettle.serve.jobs import Result
from fettle.serve.multipart import boundary_of, files_in
from fettle.serve.protocol import decode
from fettle.serve.refusal import Refusal, quote

_JSON = "application/json"
# A body has room for millions of empty texts, and each image takes a thousand bytes before it is looked at.
MAX_IMAGES = 1024


@dataclass(slots=True)
class ImageIn:
    """One image as it came. encoded: as base64 text, which a worker decodes."""

    content: bytes
    encoded: bool


class Gathered:
    """The outcomes of the images of one request. refusal: the first by number, naming its image."""

    def __init__(self, count: int, many: bool, finish: Callable[[Gathered], None]) -> None:
        self.results: list[Result | None] = [None] * count
        self.refusal: Refusal | None = None
        self._first = count
        self._left = count
        self._many = many
        self._finish = finish

    def add(self, number: int, outcome: Result | Refusal) -> None:
        """The outcome of one image; the last one finishes."""
        if isinstance(outcome, Result):
            self.results[number] = outcome
        elif number < self._first:
            named = f"image {number}: {outcome.message}" if len(self.results) > 1 else outcome.message
            self._first, self.refusal = number, Refusal(outcome.status, named, headers=outcome.headers)
        self._left -= 1
        if not self._left:
            self._finish(self)

    def content(self) -> bytes:
        """The answer's JSON."""
        parts = [result.content for result in self.results if result is not None]
        return b'{"predictions":[' + b",".join(parts) + b"]}" if self._many else parts[0]


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    image: str | None = None
    images: list[str] | None = None


def images_in(body: bytes, content_type: str) -> tuple[list[ImageIn], bool]:
    """The images of a request body, and whether the answer is a list. Raises Refusal 400, 413 or 415."""
    kind = content_type if content_type == _JSON else content_type.partition(";")[0].strip().lower()
    if kind == _JSON:
        request: _Body = decode(body, _Body)
        if (request.image is None) == (request.images is None):
            raise Refusal(400, 'the body must be {"image": base64 text} or {"images": [base64 text, ...]}')
        texts = [request.image] if request.image is not None else request.images or []
        if not texts:
            raise Refusal(400, "images must hold at least one image, got none")
        if len(texts) > MAX_IMAGES:
            raise Refusal(413, f"a request may hold at most {MAX_IMAGES} images, got {len(texts)}")
        return [ImageIn(text.encode(), encoded=True) for text in texts], request.images is not None
    if kind == "multipart/form-data":
        files = files_in(body, boundary_of(content_type))
        if not files:
            raise Refusal(400, "the form must hold at least one image file, got none")
        return [ImageIn(content, encoded=False) for content in files], len(files) > 1
    if kind.startswith("image/"):
        return [ImageIn(body, encoded=False)], False
    raise Refusal(415, f"Content-Type must be application/json, multipart/form-data or image/*, got {quote(kind)}")
