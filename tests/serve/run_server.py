"""A server process for the tests: `python run_server.py FOLDER OPTIONS_JSON`, where FOLDER is a `Shelf`.

Also holds what such a server needs, for servers inside the test process: the source and the runtime.
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from fettle.core import plugins
from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact, NotRegistered
from fettle.core.runner import Runner, RuntimeBase


@dataclass(frozen=True)
class Shelf:
    """A folder of sealed artifacts `1`, `2`, ... and a file `current` that names one of them."""

    root: Path
    name: str = "tiny"

    def current(self):
        return int((self.root / "current").read_text())

    def open(self, version):
        if not (self.root / str(version)).is_dir():
            raise NotRegistered(f"no version {version} in {self.root}")
        return Artifact.open(self.root / str(version))

    def point(self, version):
        aside = self.root / "current.tmp"
        aside.write_text(str(version))
        aside.rename(self.root / "current")


class OnnxFile(RuntimeBase):
    """`model.onnx` in ONNX Runtime, slowed or spoiled as the artifact's provenance and the rows say."""

    precisions = frozenset({"float"})

    def export(self, program, directory):
        raise NotImplementedError

    def load(self, artifact, *, threads):
        return _Loaded(artifact, threads)


class _Loaded(Runner):
    def __init__(self, artifact, threads):
        super().__init__(artifact.manifest.signature)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            content = (artifact.root / "model.onnx").read_bytes()
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as problem:
            raise CorruptArtifact(f"ONNX Runtime refuses {artifact.root}/model.onnx") from problem
        self.outputs = [spec.name for spec in self.signature.outputs]
        self.delay_s = float(artifact.manifest.provenance.get("delay_s", "0"))
        self.started = time.monotonic()

    def run(self, inputs):
        # Golden check and warm-up stay fast: only what comes after the first moments is slow.
        first = next(iter(inputs.values()))
        if self.delay_s and not np.array_equal(first.ravel()[:1], [0.125]):
            time.sleep(self.delay_s)
        if first.dtype == np.float32 and (first == 999).any():
            os._exit(9)  # a crash that no Python code can catch
        if first.dtype == np.float32 and (first == 666).any():
            raise RuntimeError("secret: the engine failed in /srv/secret/place")
        outputs = dict(zip(self.outputs, self.session.run(self.outputs, dict(inputs)), strict=True))
        if first.dtype == np.float32 and (first == 777).any():
            name = self.outputs[0]
            rows = (first.reshape(len(first), -1) == 777).any(axis=1)
            outputs[name] = outputs[name].copy()
            outputs[name][rows] = np.nan
        return outputs


@contextmanager
def runtime_in_place():
    """While it lasts, artifacts may name the runtime "onnxfile", in workers too; the list of plug-ins stays."""
    from fettle.serve import lanes

    load, command = plugins.load, lanes.COMMAND
    plugins.load = lambda package, name, base: OnnxFile if name == "onnxfile" else load(package, name, base)
    lanes.COMMAND = [sys.executable, str(Path(__file__).with_name("run_worker.py"))]
    try:
        yield
    finally:
        plugins.load, lanes.COMMAND = load, command


def say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main():
    from fettle.serve.logs import configure
    from fettle.serve.options import ServeOptions
    from fettle.serve.server import serve

    options = json.loads(sys.argv[2])
    for name in {"observations", "keys", "tls_certificate", "tls_key", "tls_client_ca"} & set(options):
        options[name] = Path(options[name])
    if "log_format" in options:
        configure(options["log_format"])
    with runtime_in_place():
        code = serve(
            Shelf(Path(sys.argv[1])),
            options=ServeOptions(**options),
            on_ready=lambda url: say(f"ready {url}"),
            on_listening=lambda url: say(f"listening {url}"),
            on_grpc=lambda address: say(f"grpc {address}"),
        )
    say(f"torch {'torch' in sys.modules}")
    sys.exit(code)


if __name__ == "__main__":
    main()
