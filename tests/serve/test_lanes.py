"""What lanes hold, with transports that only remember: nothing stays in a worker that no other has."""

import asyncio

import pytest

from fettle.core.errors import ArtifactError
from fettle.core.signature import Signature, TensorSpec
from fettle.serve import wire
from fettle.serve.lanes import Lanes
from fettle.serve.metrics import Metrics
from fettle.serve.model import Served
from fettle.serve.options import ServeOptions


class Transport:
    """The server's end of a socket; `orders` is what the worker was told."""

    def __init__(self):
        self.orders = []
        self._frames = wire.Frames()

    def write(self, data):
        self.orders += [wire.order_of(header) for header, _ in self._frames.feed(data)]


def served(version):
    x = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    return Served(
        name="m", version=version, digest="d", runtime="r", precision="float",
        signature=Signature(inputs=(x,), outputs=(x,)), row_wise=True, classifies=True,
    )  # fmt: skip


def connected(count):
    lanes = Lanes(ServeOptions(workers=count), Metrics())
    transports = [Transport() for _ in lanes.all]
    for lane, transport in zip(lanes.all, transports, strict=True):
        lane.connection_made(transport)
    return lanes, transports


def say(lane, report):
    lane.data_received(wire.frame(report))


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_version_that_one_worker_refuses_is_forgotten_by_those_still_loading():
    async def run():
        lanes, transports = connected(2)
        mounting = asyncio.ensure_future(lanes.mount(served(1), "/nowhere"))
        await turns()
        say(lanes.all[0], wire.Refused(1, "golden output differs", ""))
        with pytest.raises(ArtifactError, match="golden output differs"):
            await mounting
        assert wire.Unload(1) in transports[1].orders
        say(lanes.all[1], wire.Loaded(1, [1], [0.1]))
        await turns()
        assert lanes.all[1].keys == set()
        assert not lanes.mounted
        assert not lanes.wanted

    asyncio.run(run())


def test_a_version_unmounted_while_a_worker_takes_it_up_again_stays_forgotten():
    async def run():
        lanes, transports = connected(2)
        mounting = asyncio.ensure_future(lanes.mount(served(1), "/nowhere"))
        await turns()
        for lane in lanes.all:
            say(lane, wire.Loaded(1, [1], [0.1]))
        mounted = await mounting
        late, told = lanes.all[1], transports[1]
        late.keys.clear()  # another worker has come up here, and loads what the others have
        loading = asyncio.ensure_future(late.load(mounted))
        await turns()
        lanes.unmount(mounted)
        say(late, wire.Loaded(1, [1], [0.1]))
        with pytest.raises(ArtifactError, match="given up"):
            await loading
        assert late.keys == set()
        assert told.orders[-1] == wire.Unload(1)

    asyncio.run(run())


def test_a_worker_that_comes_up_late_and_fails_does_not_undo_a_mount():
    async def run():
        lanes, _ = connected(2)
        first, late = lanes.all
        late._transport = None
        mounting = asyncio.ensure_future(lanes.mount(served(1), "/nowhere"))
        await turns()
        late.connection_made(Transport())
        say(first, wire.Loaded(1, [1], [0.1]))
        await turns()
        say(late, wire.Refused(1, "out of memory", ""))
        mounted = await mounting
        assert (first.keys, late.keys, list(lanes.mounted)) == ({mounted.key}, set(), [mounted.key])

    asyncio.run(run())
