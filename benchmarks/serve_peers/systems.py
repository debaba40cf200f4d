"""Who is measured: fettle's server and its peers, how each is started, what it is asked and what it must answer."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness import PeerMissing, peer_python
from serve_peers import payloads
from serve_peers.artifact import (
    Expected,
    answer_all,
    answer_all_in_float,
    describe_task,
    find_subject,
    preprocess_all,
    quantize,
    save_float,
    seal,
)
from serve_peers.payloads import LENGTH_HEADER, Images, Judge, Payload
from serve_peers.processes import Launch

SCRIPTS = Path(__file__).parent
IMAGES = 64
OURS = "fettle"
FETTLE_READY = "/health/ready"
# A float model in the peer's torch and in ours need not take the same kernels.
FLOAT_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class System:
    """One server. ours: of fettle; overload: whether it is also judged beyond its capacity.

    payloads: what it is asked, by kind; tolerance: how far an answer may be from the expected one.
    """

    name: str
    launch: Launch
    payloads: Mapping[str, Payload]
    expected: Expected
    ours: bool = False
    overload: bool = True
    tolerance: float = 0.0

    def judge(self, kind: str) -> Judge:
        """For answers to this kind of request."""
        payload = self.payloads[kind]
        return payloads.judge_by(self.expected.of(payload), payload.read, tolerance=self.tolerance)


@dataclass(frozen=True, slots=True)
class Peer:
    """One of the others. environment: of `peers/`; workers: each count is a system of its own."""

    name: str
    environment: str
    script: str
    workers: tuple[int, ...]
    ready_path: str = "/ready"
    ask: Callable[[Images], dict[str, Payload]] = payloads.plain
    in_float: bool = False


PEERS = (
    Peer("FastAPI + uvicorn", "fastapi", "fastapi_server.py", (1, 2)),
    Peer("LitServe", "litserve", "litserve_server.py", (1, 2), "/health", payloads.litserve),
    Peer("BentoML", "bentoml", "bentoml_server.py", (2,), "/readyz", payloads.bentoml),
    Peer("MLServer", "mlserver", "mlserver_server.py", (2,), "/v2/health/ready", payloads.mlserver),
    Peer("Ray Serve", "ray", "ray_server.py", (2,), "/-/healthz"),
    Peer("Flask + gunicorn, torch eager", "flask", "flask_server.py", (2,), in_float=True),
)


@dataclass(frozen=True, slots=True)
class Field:
    """All that is measured in one run. artifact: what decoding and inference alone are measured on; note: its data."""

    systems: Sequence[System]
    artifact: Path | None
    note: str


def build(folder: Path, *, kinds: Sequence[str], peers: Sequence[str], missing: dict[str, str]) -> Field:
    """Seal the artifacts, write what the servers read, and say how each is started.

    kinds: of payloads, the only ones that are asked; peers: parts of names, "" for all. Who is left out, and why, is
    put in `missing`.
    """
    subject = find_subject(images=IMAGES)
    quantized = quantize(subject)
    systems: list[System] = []
    for runtime, name in (("onnxruntime", OURS), ("openvino", f"{OURS}, OpenVINO")):
        try:
            artifact = seal(subject, folder / runtime, runtime=runtime, quantized=quantized)
        except Exception as problem:
            missing[name] = f"{type(problem).__name__}: {problem}"
            continue
        rows = preprocess_all(artifact, subject.jpegs)
        images, expected = Images(subject.jpegs, rows), answer_all(artifact, rows)
        asked = payloads.plain(images)
        image_only = {"image": asked["image"]}
        main = runtime == "onnxruntime"
        launch = launch_fettle(folder / runtime)
        systems.append(System(name, launch, asked if main else image_only, expected, ours=True, overload=main))
        if main:
            write_shared(folder, asked, json.dumps(describe_task(artifact)))
            launch = launch_fettle(folder / runtime, observations=folder / "observations")
            logged = System(f"{OURS}, with prediction log", launch, image_only, expected, ours=True, overload=False)
            systems.append(logged)
            save_float(subject, folder / "model.pt2")
            in_float = answer_all_in_float(subject, artifact, rows)
            systems += build_peers(folder, images, expected, in_float=in_float, wanted=peers, missing=missing)
    artifact_folder = folder / "onnxruntime"
    return Field(
        [only(system, kinds) for system in systems if system.payloads.keys() & set(kinds)],
        artifact_folder if OURS not in missing else None,
        subject.note,
    )


def only(system: System, kinds: Sequence[str]) -> System:
    """The system, asked nothing else."""
    return replace(system, payloads={kind: system.payloads[kind] for kind in kinds if kind in system.payloads})


def write_shared(folder: Path, asked: Mapping[str, Payload], task: str) -> None:
    """What the peers and `compute.py` read."""
    (folder / "task.json").write_text(task, encoding="utf-8")
    shutil.copyfile(folder / "onnxruntime" / "model.onnx", folder / "model.onnx")
    for kind, payload in asked.items():
        payload.write(folder / f"{kind}.bodies")
    (folder / "binary.length").write_text(asked["binary"].headers[LENGTH_HEADER], encoding="utf-8")


def launch_fettle(artifact: Path, *, observations: Path | None = None) -> Launch:
    """fettle's server on an artifact, with its defaults."""
    command = (sys.executable, str(SCRIPTS / "fettle_server.py"), "{port}", str(artifact))
    command = command if observations is None else (*command, str(observations))
    return Launch(command, ready_path=FETTLE_READY)


def build_peers(
    folder: Path,
    images: Images,
    expected: Expected,
    *,
    in_float: Expected,
    wanted: Sequence[str],
    missing: dict[str, str],
) -> list[System]:
    """Each peer that is wanted, with each of its counts of workers."""
    systems = []
    for peer in PEERS:
        if not any(part.lower() in peer.name.lower() for part in wanted):
            missing[peer.name] = "not asked for"
            continue
        try:
            python = str(peer_python(peer.environment))
        except PeerMissing as problem:
            missing[peer.name] = str(problem)
            continue
        for workers in peer.workers:
            command = (python, str(SCRIPTS / peer.script), "{port}", str(workers))
            many = f", {workers} worker{'s' * (workers > 1)}" if len(peer.workers) > 1 else ""
            systems.append(
                System(
                    f"{peer.name}{many}",
                    Launch(command, {"SERVE_FOLDER": str(folder)}, peer.ready_path),
                    peer.ask(images),
                    in_float if peer.in_float else expected,
                    tolerance=FLOAT_TOLERANCE if peer.in_float else 0.0,
                )
            )
    return systems


def install_peers() -> dict[str, str]:
    """Make every peer's environment; those that cannot be made, with the reason."""
    failed = {}
    for peer in PEERS:
        try:
            peer_python(peer.environment)
        except PeerMissing as problem:
            failed[peer.name] = str(problem)
    return failed
