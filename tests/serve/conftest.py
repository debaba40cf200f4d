import asyncio
import contextlib
import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
import trustme
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fettle.core.artifact import Artifact, Manifest
from fettle.core.recipe import Recipe
from fettle.core.signature import ImagePreprocess, Signature, TensorSpec
from fettle.serve.options import ServeOptions
from fettle.serve.server import serve_until

HERE = Path(__file__).parent
CLASSES = ("red", "green", "blue")
IMAGE = ImagePreprocess(mode="RGB", resize=8, crop=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _beside(name):
    """A module of this folder: there is no package here to import it from."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


script = _beside("run_server")
load = _beside("keep_sending")
Load, body_of = load.Load, load.body_of
Shelf = script.Shelf


def value(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def save_graph(path, nodes, inputs, outputs, constants=()):
    tensors = [numpy_helper.from_array(array, name) for name, array in constants]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def seal(root, signature, golden_inputs, *, provenance=None, tolerance=1e-4, spoil=None):
    """Seal the folder with `model.onnx` in it; `spoil` may change the golden tensors before."""
    session = onnxruntime.InferenceSession((root / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in signature.outputs]
    outputs = dict(zip(names, session.run(names, golden_inputs), strict=True))
    golden = {f"input:{name}": array for name, array in golden_inputs.items()}
    golden |= {f"output:{name}": array for name, array in outputs.items()}
    if spoil is not None:
        spoil(golden)
    manifest = Manifest(
        runtime="onnxfile",
        precision="float",
        signature=signature,
        files=(),
        recipe=Recipe(name="test"),
        tolerance=tolerance,
        provenance=provenance or {},
    )
    return Artifact.seal(root, manifest, golden=golden)


def image_artifact(root, *, bias=(0.0, 0.0, 0.0), delay_s=0.0, image=IMAGE, spoil=None):
    """Class scores: five times the mean of each color channel, plus a bias that tells versions apart."""
    root.mkdir(parents=True)
    save_graph(
        root / "model.onnx",
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
            helper.make_node("Gemm", ["flat", "w", "b"], ["logits"]),
        ],
        [value("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["batch", 3])],
        [("w", 5 * np.eye(3, dtype=np.float32)), ("b", np.array(bias, np.float32))],
    )
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3, 8, 8)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),),
        classes=CLASSES,
        activation="softmax",
        image=image,
    )
    golden = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    golden[:, 0, 0, 0] = 0.125
    return seal(root, signature, {"x": golden}, provenance={"delay_s": str(delay_s)}, spoil=spoil)


TYPES = {
    "b": ("bool", TensorProto.BOOL),
    "u8": ("uint8", TensorProto.UINT8),
    "u64": ("uint64", TensorProto.UINT64),
    "i8": ("int8", TensorProto.INT8),
    "i64": ("int64", TensorProto.INT64),
    "f16": ("float16", TensorProto.FLOAT16),
    "f32": ("float32", TensorProto.FLOAT),
    "f64": ("float64", TensorProto.DOUBLE),
}


def echo_artifact(root):
    """Every data type through, under the name "out_<input>"; all of shape (batch, 2), and "wide" of (batch, 2, n)."""
    root.mkdir(parents=True)
    specs = {name: (dtype, kind, ["batch", 2]) for name, (dtype, kind) in TYPES.items()}
    specs["wide"] = ("float32", TensorProto.FLOAT, ["batch", 2, "n"])
    save_graph(
        root / "model.onnx",
        [helper.make_node("Identity", [name], [f"out_{name}"]) for name in specs],
        [value(name, kind, shape) for name, (_, kind, shape) in specs.items()],
        [value(f"out_{name}", kind, shape) for name, (_, kind, shape) in specs.items()],
    )
    inputs = tuple(TensorSpec(name=n, dtype=dtype, shape=tuple(shape)) for n, (dtype, _, shape) in specs.items())
    outputs = tuple(TensorSpec(name=f"out_{s.name}", dtype=s.dtype, shape=s.shape) for s in inputs)
    golden = {
        name: np.ones((3, 2) if len(shape) == 2 else (3, 2, 5), dtype) for name, (dtype, _, shape) in specs.items()
    }
    return seal(root, Signature(inputs=inputs, outputs=outputs), golden)


def fixed_artifact(root):
    """A model whose batch size is fixed at 2: nothing may be merged or split."""
    root.mkdir(parents=True)
    save_graph(
        root / "model.onnx",
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        [value("x", TensorProto.FLOAT, [2, 3])],
        [value("y", TensorProto.FLOAT, [2])],
        [("axes", np.array([1], np.int64))],
    )
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(2, 3)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(2,)),),
    )
    return seal(root, signature, {"x": np.ones((2, 3), np.float32)})


class Running:
    """A server inside this process, on a thread of its own."""

    def __init__(self, source, **options):
        self.urls = {}
        self.code = None
        self._listening = threading.Event()
        self._ready = threading.Event()
        options = {"port": 0, "workers": 2, "poll_s": 0.02, **options}
        self._catalogue = options.pop("catalogue", None)
        self.options = ServeOptions(**options)
        self._source = source
        self.admin_url = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._listening.wait(10)

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()

        def listening(url):
            self.url = url
            self._listening.set()

        self.code = await serve_until(
            self._stop,
            self._source,
            options=self.options,
            catalogue=self._catalogue,
            on_admin=lambda url: setattr(self, "admin_url", url),
            on_ready=lambda url: self._ready.set(),
            on_listening=listening,
            on_grpc=lambda address: setattr(self, "grpc", address),
        )

    def wait_ready(self):
        assert self._ready.wait(20)
        return self

    def stop(self):
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.code

    def client(self, **options):
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)


class Process:
    """A server in a process of its own."""

    def __init__(self, root, **options):
        options = {"port": 0, "workers": 2, "poll_s": 0.02, **options}
        warnings = options.pop("warnings", "error")
        self.process = subprocess.Popen(
            [sys.executable, "-W", warnings, str(HERE / "run_server.py"), str(root), json.dumps(options, default=str)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if "grpc_port" in options:
            self.grpc = self._line("grpc").split()[1]
        self.url = self._line("listening").split()[1]

    def _line(self, word):
        line = self.process.stdout.readline()
        assert line.startswith(word), (line, self.process.stderr.read() if not line else "")
        return line

    def wait_ready(self):
        self._line("ready")
        return self

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self, timeout_s=30):
        """The exit code and what the script said at its end."""
        out, err = self.process.communicate(timeout=timeout_s)
        assert "Traceback" not in err, err
        return self.process.returncode, out.strip()

    def client(self, **options):
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)


@pytest.fixture
def start(tmp_path):
    """Starts servers, `start(source_or_folder, process=False, **options)`, and ends them after the test."""
    running = []

    def begin(source, *, process=False, **options):
        server = (Process if process else Running)(source, **options)
        running.append(server)
        return server

    yield begin
    for server in running:
        if isinstance(server, Running):
            server.stop()
        elif server.process.poll() is None:
            server.process.kill()
            server.process.communicate()
        else:
            server.process.stdout.close()
            server.process.stderr.close()


@pytest.fixture(scope="module", autouse=True)
def runtime():
    with script.runtime_in_place():
        yield


@pytest.fixture(scope="module")
def shelf_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    image_artifact(root / "1")
    image_artifact(root / "2", bias=(0.0, 0.0, 1.0))
    (root / "current").write_text("1")
    return root


@pytest.fixture
def shelf(tmp_path):
    """A shelf of one's own, with versions 1 and 2 that answer differently, pointing at 1."""
    root = tmp_path / "shelf"
    image_artifact(root / "1")
    image_artifact(root / "2", bias=(0.0, 0.0, 1.0))
    (root / "current").write_text("1")
    return Shelf(root)


@pytest.fixture(scope="module")
def images(shelf_root, tmp_path_factory):
    """A shared server of image version 1, with a prediction log."""
    server = Running(Shelf(shelf_root), max_image_pixels=1_000_000, max_body_bytes=2_000_000).wait_ready()
    with contextlib.closing(server.client()) as client:
        yield client
    assert server.stop() == 0


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A shared server of the model with every data type."""
    root = tmp_path_factory.mktemp("echo")
    echo_artifact(root / "1")
    (root / "current").write_text("1")
    server = Running(Shelf(root, "echo")).wait_ready()
    with contextlib.closing(server.client()) as client:
        yield client
    assert server.stop() == 0


def picture(color=(255, 0, 0), *, size=(20, 12), kind="PNG", mode="RGB"):
    """An image file of one color."""
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return file.getvalue()


def until(condition, timeout_s=20.0):
    """Wait for a condition, with a deadline; its value."""
    end = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < end, "the condition never came true"
        threading.Event().wait(0.005)
    return result


@pytest.fixture
def slow(tmp_path):
    """A shelf whose version 1 takes a while for each batch."""

    def build(delay_s):
        image_artifact(tmp_path / "slow" / "1", delay_s=delay_s)
        (tmp_path / "slow" / "current").write_text("1")
        return Shelf(tmp_path / "slow")

    return build


def error_of(response, status):
    """The message of an error response, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert not re.search(r"Traceback|/work|/tmp|\.py|site-packages", body["error"])
    return body["error"]


def issue(authority, root):
    """Put a new certificate and its key where a server finds them, the key first, and the authority beside them."""
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.private_key_pem.write_to_path(str(root / "key.pem"))
    for number, part in enumerate(issued.cert_chain_pems):
        part.write_to_path(str(root / "certificate.pem"), append=number > 0)
    authority.cert_pem.write_to_path(str(root / "ca.pem"))
    return {"tls_certificate": root / "certificate.pem", "tls_key": root / "key.pem"}, issued


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="session")
def kit():
    """The builders above, for tests: conftest files cannot be imported."""
    return sys.modules[__name__]
