"""Follow the source: load what it means now beside what answers, and swap only when the new one is proven.

A version that does not load, or answers differently from its golden outputs, changes nothing; it is tried again when
the source names another version, or after a wait that doubles.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fettle.core.errors import FettleError
from fettle.serve.lanes import Mounted
from fettle.serve.logs import about
from fettle.serve.metrics import Metrics
from fettle.serve.model import Served, served_of
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import reason_of
from fettle.serve.source import ModelSource

_log = logging.getLogger("fettle.serve")
_LONGEST_RETRY_S = 300.0


class Switch:
    """Holds the model that answers. One thread writes `active`; everyone reads it once per request.

    mount(served, root): loads and proves a version in every worker, and waits for that; raises ArtifactError.
    on_change(now, before): told of each swap.
    active: None until a first version is proven. problem: why the latest load failed, in words for anyone; None
    where all is well; refused: which version that was, where it is known. attempted: True once a first load has
    ended, well or not.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        options: ServeOptions,
        metrics: Metrics,
        mount: Callable[[Served, str], Mounted],
        on_change: Callable[[Mounted, Mounted | None], None] = lambda model, before: None,
    ) -> None:
        self.active: Mounted | None = None
        self.problem: str | None = None
        self.refused: int | None = None
        self.attempted = False
        self._source = source
        self._options = options
        self._retry = _Backoff(options.retry_s)
        self._metrics = metrics
        self._mount = mount
        self._on_change = on_change
        self._stop = threading.Event()
        self._stepping = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="fettle-switch", daemon=True)

    def start(self) -> None:
        """Begin to follow, in the background."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Stop following. What is loaded stays."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _follow(self) -> None:
        while not self._stop.is_set():
            self.step()
            self._stop.wait(self._options.poll_s)

    def step(self) -> None:
        """Ask the source once, and load what it means if that is not what answers."""
        with self._stepping:
            self._step()

    def retry(self) -> None:
        """Like `step`, and a version that was refused is tried again at once."""
        with self._stepping:
            self._retry.forget()
            self._step()

    def release(self) -> Mounted | None:
        """Stop following, and return what was held, which answers no more. Waits for a load under way."""
        self._stop.set()
        with self._stepping:
            model, self.active = self.active, None
        return model

    def _step(self) -> None:
        if self._stop.is_set():
            return
        version: int | None = None
        try:
            version = self._source.current()
            if self.active is not None and version == self.active.served.version:
                self.problem = self.refused = None
                self._retry.forget()
                return
            if not self._retry.due(version):
                return
            model = self._load(version)
        except Exception as problem:
            self._failed(version, problem)
        else:
            self._swap(model)
        self.attempted = True

    def _load(self, version: int) -> Mounted:
        artifact = self._source.open(version)
        return self._mount(served_of(self._source.name, version, artifact), str(artifact.root))

    def _swap(self, model: Mounted) -> None:
        before = self.active
        self.active = model
        self.problem = self.refused = None
        self._retry.forget()
        self._metrics.switches.labels("ok").inc()
        now = model.served
        was = before.served.version if before else "nothing"
        fields = about(model=now.name, version=now.version)
        _log.info("%s:%d answers now, before it %s", now.name, now.version, was, extra=fields)
        self._on_change(model, before)

    def _failed(self, version: int | None, problem: Exception) -> None:
        """Count and tell each failed load; a source that cannot be asked is told of once, and an end is no failure."""
        if self._stop.is_set() or (version is None and self.problem is not None):
            return
        what = f"version {version} was refused" if version is not None else "the source cannot be asked"
        self.problem, self.refused = f"{what}: {reason_of(problem)}", version
        self._metrics.switches.labels("failed").inc()
        if version is not None:
            self._retry.failed(version)
        kept = f"version {self.active.served.version} goes on answering" if self.active else "nothing answers"
        unexpected = None if isinstance(problem, FettleError) else problem
        fields = about(model=self._source.name, version=version)
        _log.error("%s: %s; %s", self._source.name, self.problem, kept, exc_info=unexpected, extra=fields)


class _Backoff:
    """When a version that failed may be tried again: at once if it is another one, else after a doubling wait."""

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self.forget()

    def forget(self) -> None:
        self._version: int | None = None
        self._wait_s = self._first_s
        self._due = 0.0

    def due(self, version: int) -> bool:
        return version != self._version or time.monotonic() >= self._due

    def failed(self, version: int) -> None:
        if version != self._version:
            self.forget()
        self._version = version
        self._due = time.monotonic() + self._wait_s
        self._wait_s = min(self._wait_s * 2, _LONGEST_RETRY_S)
