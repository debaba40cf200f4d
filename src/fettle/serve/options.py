"""How to serve: one value with every limit, and defaults that are safe on a small machine."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from fettle.core.errors import UsageError
from fettle.runtime._device import wanted_device
from fettle.serve.logs import FORMATS, Format
from fettle.serve.wire import MAX_ALONE_BYTES

_CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
# Some eleven days. Timers and gRPC, which counts milliseconds in 32 bits, fail on times without end.
_MOST_SECONDS = 1_000_000


def available_cores() -> int:
    """Cores this process may use: its affinity, and a container's CPU quota rounded up.

    >>> available_cores() >= 1
    True
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_CPU.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        return max(1, allowed)


def default_workers() -> int:
    """One for each core; on a GPU at most two, so that one's work on the host overlaps with the other's kernels.

    More would wait for each other there, and each has a copy of every model on the GPU. Raises UsageError for a
    device that cannot be.
    """
    cores = available_cores()
    return cores if wanted_device() == "cpu" else min(2, cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where to listen, how much to accept, how long to wait.

    host, port: an IP address and a port; port 0 takes a free one. grpc_port: of gRPC, None for no such port.
    threads: threads inside one inference; workers: processes, and so inferences at the same time, by default one for
        each core, and at most two on a GPU.
    pin_workers: keep each worker to a core of its own, where there are as many workers of one thread as cores.
    max_batch_rows: most rows in one inference; max_queue_rows, max_queue_bytes: rows, and bytes of
        requests, that may wait; more are refused with 429.
    max_body_bytes: larger bodies are refused with 413, before they are read.
    max_image_pixels: larger images are refused from their header, before they are decoded.
    max_connections: open connections at the same time, fewer where the limit of open files is lower (`ulimit -n`);
        further ones are answered with 503.
    max_header_bytes, max_headers: of a request's target and headers; more are refused with 431.
    promise_s: batches are no larger than what ends within this time, None for no such bound.
    idle_timeout_s: a connection without a request is closed after this time; header_timeout_s: a header that is not
        whole by then ends its connection.
    body_timeout_s: a body that has not arrived by then is answered with 408; a client that takes nothing of its answer
        for so long is left.
    request_timeout_s: from the body's arrival to the answer, else 504; a client may ask for less with the header
        X-Request-Timeout-Ms. What could not be answered in time is refused at once with 429.
    worker_timeout_s: a worker that is silent for so long in one batch is ended and replaced; load_timeout_s: likewise
        one that has not loaded and proven a version by then, which takes longer than any batch where an engine
        compiles.
    grace_s: after SIGTERM readiness is 503 but requests are served for so long, until the load balancer has noticed.
    drain_timeout_s: after the grace, how long running requests may take to end.
    poll_s: how often the source is asked for its version; retry_s: first wait before a bad version is tried again,
        doubled each time.
    shadow_rows: rows that may wait for a shadow, more are not copied to it.
    observations: folder of the prediction log, None for no log; `{model}` in it stands for the model's name, for a
        server of several. It is flushed every `log_rows` rows or `log_flush_s`; more than `log_queue_rows` unwritten
        rows are dropped and counted.
    trace: spans of requests to the OpenTelemetry collector that the variables OTEL_* name; needs the extra `otel`.
    keys: file of the API keys that requests must come with (`serve/key_file.py`), None lets everyone in.
    tls_certificate, tls_key: PEM files; with them all ports speak TLS. tls_client_ca: PEM file; with it clients must
        show a certificate of that authority.
    admin_port: where models are loaded and unloaded, None for nowhere; it needs `keys`. admin_host: its address.
        admin_names: further names by which it may be called, besides that address and those of this machine.
    access_log: one line per request to the logger "fettle.serve".
    log_format: "text" or "json", of the lines that worker processes write to stderr, for they are ours; how this
        process writes its log is its owner's choice, see `serve.logs.configure`.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int | None = None
    threads: int = 1
    workers: int = field(default_factory=default_workers)
    pin_workers: bool = True
    max_batch_rows: int = 32
    max_queue_rows: int = 1024
    max_queue_bytes: int = 256 * 2**20
    max_body_bytes: int = 16 * 2**20
    max_image_pixels: int = 25_000_000
    max_connections: int = 8192
    max_header_bytes: int = 16 * 2**10
    max_headers: int = 100
    promise_s: float | None = None
    idle_timeout_s: float = 75.0
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    request_timeout_s: float = 30.0
    worker_timeout_s: float = 60.0
    load_timeout_s: float = 600.0
    grace_s: float = 0.0
    drain_timeout_s: float = 30.0
    poll_s: float = 0.25
    retry_s: float = 5.0
    shadow_rows: int = 128
    observations: Path | None = None
    log_rows: int = 5000
    log_flush_s: float = 5.0
    log_queue_rows: int = 50_000
    trace: bool = False
    keys: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    admin_port: int | None = None
    admin_host: str = "127.0.0.1"
    admin_names: tuple[str, ...] = ()
    access_log: bool = False
    log_format: Format = "text"

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port", "admin_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise UsageError(f"{name} must be 0 to 65535, got {port}")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UsageError("tls_certificate and tls_key must be given together, got only one of them")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise UsageError("tls_client_ca needs tls_certificate and tls_key: only TLS asks for certificates")
        if self.admin_port is not None and self.keys is None:
            raise UsageError("admin_port needs a key file: make one with `fettle keys add NAME --actions admin`")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, most in _AT_MOST.items():
            if getattr(self, name) > most:
                raise UsageError(f"{name} must be at most {most}, got {getattr(self, name)}")
        for name in _SECONDS:
            value = getattr(self, name)
            if value is None:
                continue
            if not 0 <= value <= _MOST_SECONDS or (value == 0 and name != "grace_s"):
                raise UsageError(f"{name} must be a positive number of seconds, at most {_MOST_SECONDS}, got {value}")
        if self.log_format not in FORMATS:
            raise UsageError(f"log_format must be one of {', '.join(FORMATS)}, got {self.log_format!r}")
        if self.max_queue_rows < self.max_batch_rows:
            raise UsageError(
                f"max_queue_rows must be at least max_batch_rows, got {self.max_queue_rows} < {self.max_batch_rows}"
            )

    def worker_cores(self) -> list[int | None]:
        """The core of each worker, None for any.

        Free workers share a core now and then while the other is idle, for the scheduler looks for such a core only
        where it has been idle for long. With fewer workers than cores, or more, it knows better.
        """
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if self.pin_workers and self.threads == 1 and len(cores) == self.workers:
            return list(cores)
        return [None] * self.workers


_AT_LEAST_ONE = (
    "threads", "workers", "max_batch_rows", "max_queue_rows", "max_queue_bytes", "max_body_bytes", "max_image_pixels",
    "max_connections", "max_header_bytes", "max_headers", "shadow_rows", "log_rows", "log_queue_rows",
)  # fmt: skip
# Beyond these no machine could do as it was told: a batch of the largest size is run before a version answers.
_AT_MOST = {
    "threads": 1024, "workers": 1024, "max_batch_rows": 2**16, "max_body_bytes": MAX_ALONE_BYTES,
    "max_header_bytes": MAX_ALONE_BYTES,
}  # fmt: skip
_SECONDS = (
    "promise_s", "idle_timeout_s", "header_timeout_s", "body_timeout_s", "request_timeout_s", "worker_timeout_s",
    "load_timeout_s", "grace_s", "drain_timeout_s", "poll_s", "retry_s", "log_flush_s",
)  # fmt: skip
