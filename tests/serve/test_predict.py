"""`/predict` on a real server: every way to send an image, and every way to send something else."""

import base64
import gzip
import json
import struct
import time
import zlib

import pytest

JSON = {"content-type": "application/json"}


def encoded(content):
    return base64.b64encode(content).decode()


def check_prediction(body, index):
    assert set(body) == {"model", "version", "request_id", "class", "index", "confidence", "probabilities"}
    assert body["index"] == index
    assert body["class"] == ("red", "green", "blue")[index]
    assert body["confidence"] == max(body["probabilities"])
    assert sum(body["probabilities"]) == pytest.approx(1.0)
    assert (body["model"], body["version"]) == ("tiny", 1)


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_predict_raw_image(images, kit, kind, index):
    content = kit.picture(COLORS[index], kind=kind)
    response = images.post("/predict", content=content, headers={"content-type": f"image/{kind.lower()}"})
    check_prediction(response.json(), index)


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,"])
def test_predict_base64(images, kit, prefix):
    response = images.post("/predict", json={"image": prefix + encoded(kit.picture((0, 255, 0)))})
    check_prediction(response.json(), 1)
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_predict_many_keeps_the_order(images, kit):
    order = [2, 0, 1, 1, 0, 2, 0]
    body = {"images": [encoded(kit.picture(COLORS[index])) for index in order]}
    predictions = images.post("/predict", json=body).json()["predictions"]
    for prediction, index in zip(predictions, order, strict=True):
        check_prediction(prediction, index)


def test_a_list_of_one_is_a_list(images, kit):
    body = images.post("/predict", json={"images": [encoded(kit.picture())]}).json()
    check_prediction(body["predictions"][0], 0)


def test_predict_multipart(images, kit):
    response = images.post("/predict", files={"image": ("a.png", kit.picture((0, 0, 255)), "image/png")})
    check_prediction(response.json(), 2)


def test_predict_multipart_with_several_files(images, kit):
    files = [("image", (f"{i}.png", kit.picture(COLORS[i]))) for i in (1, 2)]
    predictions = images.post("/predict", files=files).json()["predictions"]
    assert [p["index"] for p in predictions] == [1, 2]


def test_one_bad_image_of_many_is_named(images, kit):
    body = {"images": [encoded(kit.picture()), encoded(b"nothing"), encoded(kit.picture())]}
    assert "image 1:" in kit.error_of(images.post("/predict", json=body), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"image": 1}', b'{"image": null}', b'{"images": []}',
        b'{"images": [1]}',
        b'{"images": {}}', b'{"image": "aa", "images": ["aa"]}', b'{"image": "aGk=", "other": 1}', b'{"image": "%%%"}',
        b'{"image": "aGk"}', b'{"image": ""}', b'{"image": "aG\\nk="}', b'{"image": "\xc3\xa9"}', b'{"image": "\xff"}',
        b'{"image": "http://169.254.169.254/x"}', b'{"image": "file:///etc/passwd"}', b'{"image": "data:image/png,xx"}',
        b"[" * 100_000, b'{"images":' + b"[" * 100_000, b'{"image": NaN}',
    ],
)  # fmt: skip
def test_bad_json_bodies(images, body, kit):
    kit.error_of(images.post("/predict", content=body, headers=JSON), 400)


def test_undecodable_images(images, kit):
    good = kit.picture()
    gif = kit.picture(kind="GIF")
    for content in (b"x", gif, good[:40], good[: len(good) // 2], b"GIF89a" + b"\0" * 50, b"\x89PNG\r\n\x1a\n"):
        kit.error_of(images.post("/predict", content=content, headers={"content-type": "image/png"}), 400)
    damaged = bytearray(kit.picture(size=(64, 64), kind="JPEG"))
    kit.error_of(images.post("/predict", content=bytes(damaged[:-300]), headers={"content-type": "image/jpeg"}), 400)


def bomb(width, height):
    """A small PNG that claims, and would decode to, width × height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1001, 1000), (12_000, 12_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_from_the_header(images, size, kit):
    started = time.monotonic()
    response = images.post("/predict", content=bomb(*size), headers={"content-type": "image/png"})
    assert "pixels" in kit.error_of(response, 413)
    assert time.monotonic() - started < 5


def test_a_very_long_and_thin_image_is_refused(images, kit):
    response = images.post("/predict", content=kit.picture(size=(500_000, 1)), headers={"content-type": "image/png"})
    assert "long and thin" in kit.error_of(response, 400)


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "application/pickle", "", "x"],
)
def test_unknown_content_types_are_415(images, kit, kind):
    response = images.post("/predict", content=kit.picture(), headers={"content-type": kind})
    kit.error_of(response, 415)


@pytest.mark.parametrize("path", ["/predict", "/v2/models/tiny/infer"])
def test_bodies_may_be_compressed_and_are_bounded_when_they_are_not_any_more(images, path, kit):
    image = {"image": base64.b64encode(kit.picture()).decode()}
    body = kit.body_of() if "infer" in path else json.dumps(image).encode()
    for encoding, content in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        assert images.post(path, content=content, headers={**JSON, "content-encoding": encoding}).status_code == 200
    bomb = gzip.compress(b" " * 3_000_000)
    kit.error_of(images.post(path, content=bomb, headers={**JSON, "content-encoding": "gzip"}), 413)
    kit.error_of(images.post(path, content=b"x", headers={**JSON, "content-encoding": "gzip"}), 400)
    kit.error_of(images.post(path, content=b"x", headers={**JSON, "content-encoding": "br"}), 415)


@pytest.mark.parametrize("boundary", ["x", "boundary=", 'boundary="a', "boundary=" + "x" * 71, "boundary=<>"])
def test_bad_boundaries(images, boundary, kit):
    response = images.post("/predict", content=b"--x", headers={"content-type": f"multipart/form-data; {boundary}"})
    kit.error_of(response, 400)


def test_plain_form_fields_are_refused(images, kit):
    response = images.post("/predict", files={"image": (None, "text")})
    assert "plain field" in kit.error_of(response, 400)


def test_a_model_without_images_points_to_infer(echo, kit):
    error = kit.error_of(echo.post("/predict", json={"image": "aGk="}), 422)
    assert "/v2/models/echo/infer" in error
