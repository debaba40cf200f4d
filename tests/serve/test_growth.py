"""Hundreds of promotions leave nothing behind: with transports that answer as a worker would, at once."""

import asyncio
import gc
import time
from collections import deque
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType

from prometheus_client.parser import text_string_to_metric_families

from fettle.core.signature import Signature, TensorSpec
from fettle.serve import wire
from fettle.serve.dispatch import Dispatcher
from fettle.serve.jobs import Job
from fettle.serve.lanes import Lanes
from fettle.serve.metrics import _GONE_VERSIONS, Metrics
from fettle.serve.model import Served
from fettle.serve.options import ServeOptions

ELSEWHERE = (type, ModuleType, FunctionType, BuiltinFunctionType, FrameType, asyncio.AbstractEventLoop, asyncio.Future)


class Transport:
    """A worker that loads everything, and answers every item with itself."""

    def __init__(self, lane):
        self._lane = lane
        self._frames = wire.Frames()

    def writelines(self, parts):
        self.write(b"".join(bytes(part) for part in parts))

    def write(self, data):
        for header, body in self._frames.feed(data):
            order = wire.order_of(header)
            if isinstance(order, wire.Load):
                self._say(wire.Loaded(order.key, [1, 2], [0.1, 0.2]))
            elif isinstance(order, wire.Work):
                outcomes = [wire.Outcome(200, item.size) for item in order.items]
                self._say(wire.Done(order.id, outcomes, 0.001, len(outcomes)), bytes(body))

    def _say(self, report, body=b""):
        asyncio.get_running_loop().call_soon(self._lane.data_received, wire.frame(report, len(body)) + body)


def served(version, name="m"):
    x = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    return Served(
        name=name, version=version, digest="d", runtime="r", precision="float",
        signature=Signature(inputs=(x,), outputs=(x,)), row_wise=True, classifies=True,
    )  # fmt: skip


def held(*roots):
    """How much is in all containers that can be reached from these objects."""
    waiting, seen, count = list(roots), set(), 0
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, ELSEWHERE):
            continue
        seen.add(id(one))
        if isinstance(one, dict | list | set | deque):
            count += len(one)
        waiting += gc.get_referents(one)
    return count


class Bench:
    def __init__(self):
        self.metrics = Metrics()
        options = ServeOptions(workers=2)
        self.lanes = Lanes(options, self.metrics)
        self.dispatcher = Dispatcher(self.lanes, options=options, metrics=self.metrics, observe=False)
        self.active = None
        for lane in self.lanes.all:
            lane.connection_made(Transport(lane))

    async def promote(self, version, name="m"):
        """Switch to a version, ask it something, and wait until the one before has gone."""
        model = await self.lanes.mount(served(version, name), "/nowhere")
        before, self.active = self.active, model
        if before is not None:
            self.dispatcher.retire(before)
        await self.ask()
        self.dispatcher._forget_retired()

    async def ask(self):
        answered = asyncio.get_running_loop().create_future()
        model, deadline = self.active, time.monotonic() + 20
        self.dispatcher.admit(model, deadline=deadline)
        item = wire.Item("a", 1)
        job = Job(
            model=model, kind="json", item=item, payload=b"a", rows=1, deadline=deadline, done=answered.set_result
        )
        self.dispatcher.submit([job])
        await answered
        name, version = model.served.name, str(model.served.version)
        self.metrics.answered_by(name, version, 200)
        self.metrics.assigned_to(name, "champion", version)
        self.metrics.shadow.requests.labels(name, version, "answered").inc()
        self.metrics.shadow.rows.labels(name, version, "agreed").inc()
        self.metrics.shadow.difference.labels(name, version).observe(0.0)

    def versions(self):
        """Model and version of each series that has these labels, and of how many series each."""
        found = {}
        for family in text_string_to_metric_families(self.metrics.render().decode()):
            for sample in family.samples:
                if "version" in sample.labels:
                    one = sample.labels["model"], int(sample.labels["version"])
                    found[one] = found.get(one, 0) + 1
        return found


def test_hundreds_of_promotions_take_no_more_memory_than_some():
    async def run():
        bench = Bench()
        sizes = []
        for version in range(1, 401):
            await bench.promote(version)
            if version in (100, 400):
                sizes.append(held(bench.dispatcher, bench.lanes, bench.metrics))
        assert sizes[0] == sizes[1]
        assert set(bench.versions()) == {("m", version) for version in range(400 - _GONE_VERSIONS, 401)}
        assert len(set(bench.versions().values())) == 1  # each has all of its series, or none

    asyncio.run(run())


def test_a_version_that_comes_back_counts_on_and_one_that_is_loaded_twice_is_not_forgotten():
    async def run():
        bench = Bench()
        await bench.promote(1)
        await bench.promote(2)
        await bench.promote(1)
        assert 'fettle_model_requests_total{code="200",model="m",version="1"} 2.0' in bench.metrics.render().decode()
        await bench.lanes.mount(served(1), "/nowhere")  # by a second variant, which keeps it
        for version in range(2, 40):
            await bench.promote(version)
        assert ("m", 1) in bench.versions()
        assert len(bench.versions()) == 2 + _GONE_VERSIONS

    asyncio.run(run())


def test_models_that_were_unloaded_are_among_those_that_have_gone():
    async def run():
        bench = Bench()
        for number in range(40):
            await bench.promote(1, f"m{number}")
        assert len(bench.versions()) == 1 + _GONE_VERSIONS

    asyncio.run(run())
