"""The demonstration's load, against a small HTTP server, and its broken camera."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from fettle.core.project import Project
from fettle.demo.client import corrupt, encode, send
from fettle.demo.run import PROJECT


@pytest.fixture
def server():
    """Answers with the brightest column as the class, and refuses all-black images."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["image"]))))
            status, answer = 200, {"version": 3, "index": int(image.sum(axis=0).argmax())}
            if not image.any():
                status, answer = 422, {"error": "black"}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def images(count):
    found = np.zeros((count, 8, 8), np.uint8)
    labels = np.arange(count) % 8
    found[np.arange(count), :, labels] = 200
    return found, labels


def test_every_image_is_answered_once(server):
    pictures, labels = images(40)
    answers = send(server, list(pictures), labels.tolist())
    assert (answers.answered, answers.right, answers.versions, answers.failures) == (40, 40, {"3": 40}, [])


def test_refusals_are_kept_in_words(server):
    pictures, labels = images(8)
    pictures[2] = 0
    answers = send(server, list(pictures), labels.tolist())
    assert (answers.answered, answers.failures) == (7, ["422: black"])


def test_an_encoded_image_is_the_image():
    picture = images(1)[0][0]
    decoded = Image.open(io.BytesIO(base64.b64decode(json.loads(encode(picture))["image"])))
    np.testing.assert_array_equal(np.asarray(decoded), picture)


def test_corruption_is_strong_and_the_same_each_time():
    pictures = images(20)[0]
    bad = corrupt(pictures)
    assert (bad.dtype, bad.shape) == (np.uint8, pictures.shape)
    np.testing.assert_array_equal(bad, corrupt(pictures))
    assert np.abs(bad.astype(int) - pictures).mean() > 20


def test_the_three_parts_never_mix():
    project = Project.open(PROJECT)
    parts = {}
    for name in ("train", "validation", "test"):
        parts[name] = [x.numpy().tobytes() for batch, _ in project.call(f"data.{name}", f"data:{name}") for x in batch]
    assert [len(parts[name]) for name in parts] == [797, 500, 500]
    assert not set(parts["train"]) & set(parts["test"])
    assert not set(parts["validation"]) & set(parts["test"])
