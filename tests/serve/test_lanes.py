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


def connected(count, **options):
    lanes = Lanes(ServeOptions(workers=count, **options), Metrics())
    transports = [Transport() for _ in lanes.all]
    for lane, transport in zip(lanes.all, transports, strict=True):
        lane.connection_made(transport)
    return lanes, transports


def say(lane, report):
    lane.data_received(wire.frame(report))


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


async def mounted_in(lanes):
    """The first version, in every worker."""
    mounting = asyncio.ensure_future(lanes.mount(served(1), "/nowhere"))
    await turns()
    for lane in lanes.all:
        say(lane, wire.Loaded(1, [1], [0.1]))
    return await mounting


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
        mounted = await mounted_in(lanes)
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


class Process:
    """A worker's process, which ends at once when it is killed; loads have time from then on."""

    def __init__(self, lane):
        self._lane = lane

    def kill(self):
        self._lane._lanes.options = ServeOptions(workers=1)
        self._lane.connection_lost(None)


def replaced(lane):
    """Another worker has come up, with what the others have."""
    transport = Transport()
    lane.connection_made(transport)
    lane._complete.set()
    return transport


def loads(transport):
    return [order.key for order in transport.orders if isinstance(order, wire.Load)]


def test_a_worker_that_dies_once_during_a_mount_is_replaced_and_the_version_tried_again_there():
    async def run():
        lanes, transports = connected(2)
        first, second = lanes.all
        await mounted_in(lanes)
        mounting = asyncio.ensure_future(lanes.mount(served(2), "/nowhere"))
        await turns()
        first.connection_lost(None)
        assert first.died_trying
        await turns()
        assert loads(transports[1]) == [1]  # no other worker is risked
        again = replaced(first)
        await turns()
        assert loads(again) == [2]
        say(first, wire.Loaded(2, [1], [0.1]))
        await turns()
        say(second, wire.Loaded(2, [1], [0.1]))
        mounted = await mounting
        assert all(mounted.key in lane.keys for lane in lanes.all)
        assert not lanes._excused

    asyncio.run(run())


@pytest.mark.parametrize("count", [1, 3])
def test_a_second_death_in_one_mount_is_the_versions_fault(count):
    async def run():
        lanes, _ = connected(count)
        mounting = asyncio.ensure_future(lanes.mount(served(1), "/nowhere"))
        await turns()
        for lane in lanes.all:
            lane.connection_lost(None)
        await turns()
        if count == 1:
            replaced(lanes.all[0])
            await turns()
            lanes.all[0].connection_lost(None)
        with pytest.raises(ArtifactError, match="died while it loaded"):
            await mounting
        for lane in lanes.all:
            assert loads(replaced(lane)) == []
        await turns()
        assert not lanes.wanted
        assert not lanes._excused

    asyncio.run(run())


def test_a_worker_that_does_not_load_in_time_is_ended_and_replaced():
    async def run():
        lanes, _ = connected(1, load_timeout_s=0.02)
        (lane,) = lanes.all
        lane.process = Process(lane)
        ended = lane._lost.wait()
        mounting = asyncio.ensure_future(lanes.mount(served(1), "/nowhere"))
        await asyncio.wait_for(ended, 20)
        replaced(lane)
        await turns()
        say(lane, wire.Loaded(1, [1], [0.1]))
        assert (await mounting).key in lane.keys

    asyncio.run(run())


def test_nothing_is_mounted_unproven_where_no_worker_lives_at_that_moment():
    async def run():
        lanes, _ = connected(2)
        for lane in lanes.all:
            lane.connection_lost(None)
        mounting = asyncio.ensure_future(lanes.mount(served(1), "/nowhere"))
        await turns()
        assert not mounting.done()
        replaced(lanes.all[1])
        await turns()
        say(lanes.all[1], wire.Loaded(1, [1], [0.1]))
        mounted = await mounting
        assert lanes.all[1].keys == {mounted.key}

    asyncio.run(run())


def test_a_worker_that_was_lost_before_its_turn_in_a_mount_says_nothing_of_the_version():
    async def run():
        lanes, _ = connected(2)
        await mounted_in(lanes)
        mounting = asyncio.ensure_future(lanes.mount(served(2), "/nowhere"))
        await turns()
        lanes.all[1].connection_lost(None)
        assert not lanes.all[1].died_trying
        say(lanes.all[0], wire.Loaded(2, [1], [0.1]))
        mounted = await mounting
        assert (lanes.all[0].keys, lanes.all[1].keys) == ({1, mounted.key}, set())

    asyncio.run(run())


def test_a_mount_under_way_ends_with_the_server():
    async def run():
        lanes, _ = connected(1)
        (lane,) = lanes.all
        mounting = asyncio.ensure_future(lanes.mount(served(1), "/nowhere"))
        await turns()
        lane.connection_lost(None)
        await turns()
        waiting = asyncio.ensure_future(lanes.mount(served(2), "/nowhere"))
        await lanes.close(1.0)
        for one in (mounting, waiting):
            with pytest.raises(ArtifactError, match="shutting down"):
                await one

    asyncio.run(run())
