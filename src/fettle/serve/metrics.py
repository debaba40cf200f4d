"""What Prometheus sees of the server, in a registry of its own."""

from __future__ import annotations

from collections import Counter as Numbers
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from fettle.serve.tallies import Count, Counts, Spread, Spreads

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_VERSION = ("model", "version")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# A scrape must find a version's last counts after it has gone, and costs some 50 lines of text for each.
_GONE_VERSIONS = 8
_DIFFERENCES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)


class Metrics:
    """The counters, as attributes; `render` gives the text of `/metrics`."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._by_route: dict[tuple[str, int], tuple[Count, Spread]] = {}
        self.requests = Counts(
            "fettle_requests", "Requests answered, by route and status.", ("route", "code"), registry=registry
        )
        self.request_seconds = Spreads(
            "fettle_request_seconds", "From a request's header to its answer.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.queue_seconds = Spreads(
            "fettle_queue_seconds", "Time that a job waited for a worker.", _VERSION,
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.inference_seconds = Spreads(
            "fettle_inference_seconds", "Time of one batch in the engine.", _VERSION,
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_rows = Spreads("fettle_batch_rows", "Rows in one batch.", _VERSION, buckets=_ROWS, registry=registry)
        self.in_flight = Gauge("fettle_requests_in_flight", "Requests being answered.", registry=registry)
        self.shed = Counts(
            "fettle_requests_shed", "Requests refused with 429: no answer in time.", _VERSION, registry=registry
        )
        self.worker_deaths = Counter("fettle_worker_deaths", "Worker processes that ended.", registry=registry)
        self.observations = Counter("fettle_observations_written", "Rows in the prediction log.", registry=registry)
        self.observations_dropped = Counter(
            "fettle_observations_dropped", "Rows lost for a full queue or disk.", registry=registry
        )
        self.switches = Counter(
            "fettle_switches", "Loads of a version, by result (ok or failed).", ("result",), registry=registry
        )
        self.ready = Gauge("fettle_ready", "1 where the server would take traffic.", registry=registry)
        self._answering = _Answering()
        registry.register(self._answering)
        self._of_version = Counts(
            "fettle_model_requests", "Requests that a version answered or refused, by status.",
            (*_VERSION, "code"), registry=registry,
        )  # fmt: skip
        self._assigned = Counts(
            "fettle_assigned", "Requests that a variant was chosen for, where a model has several.",
            ("model", "variant", "version"), registry=registry,
        )  # fmt: skip
        self.shadow = ShadowMetrics(registry)
        by_version = self.queue_seconds, self.inference_seconds, self.batch_rows, self.shed
        shadow = self.shadow.requests, self.shadow.rows, self.shadow.difference
        self.versions = VersionSeries(by_version, (*by_version, self._of_version, self._assigned, *shadow))
        self._in_hand = _InHand()
        registry.register(self._in_hand)
        self._queued = Gauge("fettle_queue_rows", "Rows that wait for a worker.", registry=registry)
        for result in ("ok", "failed"):
            self.switches.labels(result)

    def watch(
        self,
        *,
        queued_rows: Callable[[], int],
        in_flight: Callable[[], int],
        ready: Callable[[], bool],
        jobs: Callable[[], Mapping[tuple[str, str], int]],
        versions: Callable[[], Iterable[tuple[str, str, str, str, str]]],
    ) -> None:
        """Read these when asked for, instead of being told each time they change.

        jobs: how many of each model and version wait or are with a worker.
        versions: model, version, digest, runtime and precision of each that answers.
        """
        self._answering.read = versions
        self._in_hand.read = jobs
        self._queued.set_function(queued_rows)
        self.in_flight.set_function(in_flight)
        self.ready.set_function(ready)

    def answered(self, route: str, code: int, seconds: float) -> None:
        """Count an answer."""
        key = (route, code)
        found = self._by_route.get(key)
        if found is None:  # looking labels up takes longer than counting
            found = self.requests.labels(route, str(code)), self.request_seconds.labels(route)
            self._by_route[key] = found
        found[0].inc()
        found[1].observe(seconds)

    def answered_by(self, model: str, version: str, code: int) -> None:
        """Count a request that this version was chosen for."""
        self._of_version.labels(model, version, str(code)).inc()

    def assigned_to(self, model: str, variant: str, version: str) -> None:
        """Count a choice among several variants."""
        self._assigned.labels(model, variant, version).inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


class VersionSeries:
    """Which versions have series: those in the workers, and the latest that were. Else they grew with each promotion.

    begun: families that have a series of each version from its first moment: from 0 its first event is seen. every:
    all families with the labels model and version.
    """

    def __init__(self, begun: Iterable[Counts | Spreads], every: Iterable[Counts | Spreads]) -> None:
        self._begun = tuple(begun)
        self._every = tuple(every)
        self._here: Numbers[tuple[str, str]] = Numbers()
        self._gone: dict[tuple[str, str], None] = {}  # in the order in which they went

    def begin(self, model: str, version: str) -> None:
        """A version was loaded, perhaps once more: what it counted before goes on."""
        self._here[model, version] += 1
        self._gone.pop((model, version), None)
        for family in self._begun:
            family.labels(model, version)

    def end(self, model: str, version: str) -> None:
        """A version has left the workers, as often as it was loaded; its last request has ended."""
        one = model, version
        self._here[one] -= 1
        if self._here[one] > 0:
            return
        del self._here[one]
        self._gone[one] = None
        if len(self._gone) > _GONE_VERSIONS:
            del self._gone[next(iter(self._gone))]
            known = self._here.keys() | self._gone.keys()
            for family in self._every:
                family.keep(known)


class ShadowMetrics:
    """What became of the copies of requests, and how their answers compare with those that were given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counts(
            "fettle_shadow_requests", "Copies for a shadow, by what became of them: answered, failed or dropped.",
            (*_VERSION, "result"), registry=registry,
        )  # fmt: skip
        self.rows = Counts(
            "fettle_shadow_rows", "Rows of a shadow, by whether their class is the one answered: agreed or disagreed.",
            (*_VERSION, "result"), registry=registry,
        )  # fmt: skip
        self.difference = Spreads(
            "fettle_shadow_difference", "Largest absolute difference between a shadow's answer and the one given.",
            _VERSION, buckets=_DIFFERENCES, registry=registry,
        )  # fmt: skip
        self.worker_deaths = Counter(
            "fettle_shadow_worker_deaths", "Worker processes of shadows that ended.", registry=registry
        )


class _Answering(Collector):
    """The versions that answer, as they are when asked for."""

    def __init__(self) -> None:
        self.read: Callable[[], Iterable[tuple[str, str, str, str, str]]] = tuple

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ("model", "version", "digest", "runtime", "precision")
        family = GaugeMetricFamily("fettle_model_info", "The versions that answer: always 1.", labels=labels)
        for values in sorted(set(self.read())):
            family.add_metric(values, 1)
        yield family


class _InHand(Collector):
    """What the workers have to do, by version, as it is when asked for."""

    def __init__(self) -> None:
        self.read: Callable[[], Mapping[tuple[str, str], int]] = dict

    def collect(self) -> Iterator[GaugeMetricFamily]:
        what = "Requests, or images of one, that wait for a worker or are with it."
        family = GaugeMetricFamily("fettle_model_in_flight", what, labels=_VERSION)
        for values, count in sorted(self.read().items()):
            family.add_metric(values, count)
        yield family
