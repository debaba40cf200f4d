"""The dispatcher with lanes made of Python, so that the tests decide when a batch ends and when a worker dies."""

import asyncio
import functools
import operator
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.core.signature import Signature, TensorSpec
from fettle.serve import wire
from fettle.serve.dispatch import _AIM as AIM
from fettle.serve.dispatch import _TURNS as TURNS
from fettle.serve.dispatch import Dispatcher
from fettle.serve.fit import BatchTimes
from fettle.serve.jobs import Job, Result
from fettle.serve.lanes import Mounted
from fettle.serve.metrics import Metrics
from fettle.serve.model import Served
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal

STATISTICS = wire.STATISTICS


def batch_s(rows):
    """What a batch takes here, as far as the dispatcher is told: so much of it fixed that any size is worth it."""
    return 1.0 + rows / 1000


TIMES = ((1, batch_s(1)), (8, batch_s(8)))


def mounted(key=1, *, row_wise=True, times=TIMES):
    """A version; its free dimension is fixed where the model is not row-wise."""
    x = TensorSpec(name="x", dtype="float32", shape=("batch" if row_wise else 2, 3))
    served = Served(
        name="m",
        version=key,
        digest="d" * 64,
        runtime="python",
        precision="float",
        signature=Signature(inputs=(x,), outputs=(x,)),
        row_wise=row_wise,
        classifies=row_wise,
    )
    return Mounted(key, served, "/nowhere", BatchTimes(times))


class Lane:
    """A worker that answers when a test says so."""

    def __init__(self, number, lanes, keys):
        self.number = number
        self.alive = True
        self.died_trying = False
        self.batch = None
        self.busy_since = 0.0
        self.keys = set(keys)
        self.sent = []
        self.kills = 0
        self._lanes = lanes

    def send(self, work, payloads, batch):
        assert self.alive
        assert self.batch is None
        assert work.key in self.keys
        assert [item.size for item in work.items] == [len(payload) for payload in payloads]
        self.batch, self.busy_since = batch, time.monotonic()
        self.sent.append((work, [bytes(payload) for payload in payloads]))

    def kill(self):
        self.kills += 1

    def finish(self, outcomes=None, body=None, *, took_s=None):
        """End the batch; without outcomes every job gets its own payload back."""
        work, payloads = self.sent[-1]
        batch, self.batch = self.batch, None
        rows = sum(job.rows for job in batch)
        self.busy_since = time.monotonic() - (batch_s(rows) if took_s is None else took_s)
        if outcomes is None:
            outcomes = [wire.Outcome(200, len(payload)) for payload in payloads]
            body = b"".join(payloads)
        report = wire.Done(work.id, outcomes, 0.001, rows)
        try:
            wire.check_done(report, work, len(body))
            self._lanes.on_done(self, batch, report, memoryview(body))
        except Exception:  # as a real lane does with a worker that makes no sense
            self.batch = batch
            self.lose()

    def lose(self, *, trying=False):
        """The worker dies, perhaps while it loads a new version."""
        self.alive = False
        self.died_trying = trying
        self.keys.clear()
        batch, self.batch = self.batch, None
        self._lanes.on_lost(self, batch)

    def revive(self, keys):
        """Another worker has loaded everything."""
        self.alive = True
        self.keys = set(keys)
        self._lanes.on_idle(self)


class Lanes:
    def __init__(self, count, keys):
        self.all = [Lane(number, self, keys) for number in range(count)]
        self.problem = None
        self.mounted = set(range(100))
        self.unmounted = []

    @property
    def living(self):
        return len(self.all)

    def unmount(self, model):
        self.unmounted.append(model)
        self.mounted.discard(model.key)
        for lane in self.all:
            lane.keys.discard(model.key)


class Bench:
    """A dispatcher, its lanes, and what became of every job."""

    def __init__(self, *, lanes=1, keys=(1, 2), observe=False, **options):
        options = {"max_batch_rows": 8, "max_queue_rows": 64, **options}
        self.lanes = Lanes(lanes, keys)
        self.metrics = Metrics()
        self.options = ServeOptions(workers=lanes, **options)
        self.dispatcher = Dispatcher(self.lanes, options=self.options, metrics=self.metrics, observe=observe)
        self.outcomes = {}
        self.settled_at = {}
        self.times_settled = Counter()

    def job(self, name, *, model, rows=1, kind="json", timeout_s=20.0, payload=None):
        """A job whose payload is its name."""
        payload = str(name).encode() if payload is None else payload

        def done(outcome):
            self.times_settled[name] += 1
            self.outcomes[name] = outcome
            self.settled_at[name] = time.monotonic()

        return Job(
            model=model,
            kind=kind,
            item=wire.Item(str(name), len(payload)),
            payload=payload,
            rows=rows,
            deadline=time.monotonic() + timeout_s,
            done=done,
        )

    def submit(self, name, **options):
        job = self.job(name, **options)
        self.dispatcher.submit([job])
        return job

    def names(self, lane=0):
        """The jobs in each batch that the lane was given."""
        return [[payload.decode() for payload in payloads] for _, payloads in self.lanes.all[lane].sent]

    def status(self, name):
        outcome = self.outcomes[name]
        return outcome.status if isinstance(outcome, Refusal) else 200

    async def finish_all(self):
        """End batch after batch until none is left."""
        await turn()
        while any(lane.batch is not None for lane in self.lanes.all):
            for lane in self.lanes.all:
                if lane.batch is not None:
                    lane.finish()
            await turn()


async def turn():
    """Let the loop run what is due."""
    for _ in range(TURNS + 2):
        await asyncio.sleep(0)


async def until(condition, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        await asyncio.sleep(0.001)


def play(scene, **options):
    """Run a scene on a bench of its own."""

    async def whole():
        bench = Bench(**options)
        try:
            return await scene(bench)
        finally:
            bench.dispatcher.close()

    return asyncio.run(whole())


# What runs together


def test_a_lone_request_does_not_wait_for_company():
    async def scene(bench):
        bench.submit("a", model=mounted())
        await turn()
        assert bench.names() == [["a"]]
        bench.lanes.all[0].finish()
        assert bench.outcomes["a"].content == b"a"

    play(scene)


@pytest.mark.parametrize("turns_between", [0, 1])
def test_what_arrives_in_one_turn_or_the_next_runs_together(turns_between):
    async def scene(bench):
        model = mounted()
        for name in "abc":
            bench.submit(name, model=model)
            for _ in range(turns_between):
                await asyncio.sleep(0)
        await turn()
        assert bench.names() == [["a", "b", "c"]]

    play(scene)


def test_arrivals_without_end_hold_nothing_back():
    async def scene(bench):
        model = mounted()
        for name in range(3 * TURNS):
            bench.submit(name, model=model)
            await asyncio.sleep(0)
        (first,) = bench.names()
        assert first == [str(name) for name in range(TURNS + 1)]

    play(scene, max_batch_rows=32)


def test_what_waits_is_taken_together_up_to_the_maximum():
    async def scene(bench):
        model = mounted()
        bench.submit("first", model=model)
        await turn()
        for number in range(11):
            bench.submit(number, model=model)
        assert bench.dispatcher.queued_rows == 11
        await bench.finish_all()
        assert [len(names) for names in bench.names()] == [1, 8, 3]
        assert functools.reduce(operator.iadd, bench.names(), []) == ["first", *map(str, range(11))]
        assert bench.dispatcher.queued_rows == 0

    play(scene)


def test_the_maximum_is_of_rows_and_larger_jobs_run_alone():
    async def scene(bench):
        model = mounted()
        for name, rows in (("a", 3), ("b", 5), ("c", 1), ("d", 20), ("e", 1)):
            bench.submit(name, model=model, rows=rows)
        await bench.finish_all()
        assert bench.names() == [["a", "b"], ["c"], ["d"], ["e"]]

    play(scene)


def test_the_maximum_is_of_bytes_too_and_larger_jobs_run_alone(monkeypatch):
    monkeypatch.setattr(wire, "MAX_BATCH_BYTES", 10)

    async def scene(bench):
        model = mounted()
        bench.submit("first", model=model)
        await turn()
        for name, size in (("a", 4), ("b", 6), ("c", 1), ("d", 11), ("e", 10)):
            bench.submit(name, model=model, payload=name.encode() * size)
        await bench.finish_all()
        assert bench.names()[1:] == [["aaaa", "bbbbbb"], ["c"], ["d" * 11], ["e" * 10]]
        assert {bench.status(name) for name in "abcde"} == {200}

    play(scene)


def test_a_batch_is_no_larger_than_its_latency_is_worth():
    async def scene(bench):
        model = mounted(times=[(1, 0.011), (2, 0.021), (8, 0.081)])  # 10 ms a row, 1 ms fixed
        for name in "abcdefghij":
            bench.submit(name, model=model)
        await turn()
        assert [len(names) for names in bench.names()] == [3]

    play(scene, promise_s=0.0315)


@pytest.mark.parametrize(("jobs", "expected"), [(8, [4, 4]), (9, [5, 4]), (2, [1, 1]), (1, [1, 0])])
def test_idle_lanes_share_what_waits(jobs, expected):
    async def scene(bench):
        model = mounted()
        for number in range(jobs):
            bench.submit(number, model=model)
        await turn()
        assert [len(functools.reduce(operator.iadd, bench.names(lane), [])) for lane in (0, 1)] == expected

    play(scene, lanes=2)


def test_a_lane_without_the_model_is_not_given_its_jobs():
    async def scene(bench):
        bench.lanes.all[0].keys = {2}
        bench.submit("a", model=mounted(1))
        bench.submit("b", model=mounted(2))
        await turn()
        assert bench.names(0) == [["b"]]
        assert bench.names(1) == [["a"]]

    play(scene, lanes=2)


def test_a_model_that_no_lane_has_yet_does_not_hold_up_the_others():
    async def scene(bench):
        lane = bench.lanes.all[0]
        lane.keys = {2}
        bench.submit("a", model=mounted(1))
        bench.submit("b", model=mounted(2))
        await bench.finish_all()
        assert bench.names() == [["b"]]
        assert bench.dispatcher.queued_rows == 1
        lane.revive({1, 2})
        await bench.finish_all()
        assert bench.names() == [["b"], ["a"]]

    play(scene)


@pytest.mark.parametrize("what", ["model", "kind"])
def test_what_differs_is_never_merged(what):
    async def scene(bench):
        models = [mounted(1), mounted(2)]
        for number in range(6):
            other = number % 2
            model = models[other] if what == "model" else models[0]
            kind = ("json", "binary")[other] if what == "kind" else "json"
            bench.submit(number, model=model, kind=kind)
        await bench.finish_all()
        assert bench.names() == [["0", "2", "4"], ["1", "3", "5"]]
        works = [work for work, _ in bench.lanes.all[0].sent]
        assert [(work.key, work.kind) for work in works] == (
            [(1, "json"), (2, "json")] if what == "model" else [(1, "json"), (1, "binary")]
        )
        assert len({work.id for work in works}) == 2

    play(scene)


def test_a_model_of_a_fixed_size_runs_one_request_at_a_time():
    async def scene(bench):
        model = mounted(row_wise=False)
        for name in "abc":
            bench.submit(name, model=model)
        await bench.finish_all()
        assert bench.names() == [["a"], ["b"], ["c"]]

    play(scene)


def test_the_oldest_leads_the_next_batch():
    """A stream for another model cannot starve a job."""

    async def scene(bench):
        steady, rare = mounted(1), mounted(2)
        bench.submit("first", model=steady)
        await turn()
        bench.submit("s0", model=steady)
        bench.submit("rare", model=rare)
        for number in range(1, 7):
            bench.submit(f"s{number}", model=steady)
        await bench.finish_all()
        assert bench.names()[:3] == [["first"], ["s0", "s1"], ["rare"]]

    play(scene, max_batch_rows=2)


def test_the_work_says_what_the_worker_must_know():
    async def scene(bench):
        bench.submit("a", model=mounted(), kind="binary", rows=2)
        await turn()
        ((work, payloads),) = bench.lanes.all[0].sent
        assert work == wire.Work(work.id, 1, "binary", [wire.Item("a", 1)], True, 1234, 64)
        assert payloads == [b"a"]

    play(scene, observe=True, max_image_pixels=1234)


# The answers


def test_every_job_gets_its_own_part_of_the_body():
    async def scene(bench):
        model = mounted()
        for name in "abcd":
            bench.submit(name, model=model)
        await turn()
        observed = [np.arange(2 * 3 + 2 * STATISTICS, dtype=np.float32), np.arange(100, 104 + STATISTICS, dtype="f4")]
        outcomes = [
            wire.Outcome(200, 5, header_bytes=2, rows=2, classes=3),
            wire.Outcome(400, 6),
            wire.Outcome(200, 0, rows=1, classes=4),
            wire.Outcome(200, 3),
        ]
        bench.lanes.all[0].finish(
            outcomes, b"first" + observed[0].tobytes() + "schön".encode() + observed[1].tobytes() + b"end"
        )
        results = [bench.outcomes[name] for name in "abcd"]
        assert (results[0].content, results[0].header_bytes) == (b"first", 2)
        assert (results[0].rows, results[0].classes, results[0].observed) == (2, 3, observed[0].tobytes())
        assert (results[1].status, results[1].message) == (400, "schön")
        assert (results[2].content, results[2].observed) == (b"", observed[1].tobytes())
        assert (results[3].content, results[3].observed, results[3].rows) == (b"end", b"", 0)

    play(scene)


@given(st.lists(st.tuples(st.binary(max_size=9), st.booleans(), st.integers(0, 3), st.integers(1, 4)), min_size=1))
@settings(deadline=None, max_examples=50)
def test_any_body_is_cut_where_it_was_joined(parts):
    parts = parts[:8]

    async def scene(bench):
        model = mounted()
        for number in range(len(parts)):
            bench.submit(number, model=model)
        await turn()
        outcomes, body, expected = [], b"", []
        for number, (content, fails, rows, classes) in enumerate(parts):
            if fails:
                text = content.hex()
                outcomes.append(wire.Outcome(422, len(text)))
                body += text.encode()
                expected.append((422, text))
                continue
            classes = classes if rows else 0
            observed = bytes([number]) * (4 * rows * (classes + STATISTICS))
            outcomes.append(wire.Outcome(200, len(content), 0, rows, classes))
            body += content + observed
            expected.append((content, observed))
        bench.lanes.all[0].finish(outcomes, body)
        found = [bench.outcomes[number] for number in range(len(parts))]
        assert expected == [
            (one.status, one.message) if isinstance(one, Refusal) else (one.content, one.observed) for one in found
        ]

    play(scene)


def test_the_time_of_a_batch_is_learned_and_told():
    async def scene(bench):
        model = mounted(times=())
        bench.submit("a", model=model, rows=4)
        await turn()
        bench.lanes.all[0].finish(took_s=0.4)
        assert model.times.seconds(4) == pytest.approx(0.4, abs=0.2)
        text = bench.metrics.render().decode()
        assert 'fettle_batch_rows_sum{model="m",version="1"} 4.0' in text
        assert 'fettle_queue_seconds_count{model="m",version="1"} 1.0' in text
        assert 'fettle_inference_seconds_sum{model="m",version="1"} 0.001' in text

    play(scene)


@pytest.mark.parametrize(
    "how",
    [
        "too few outcomes",
        "no text",
        "too many outcomes",
    ],
)
def test_a_report_that_makes_no_sense_leaves_no_job_without_an_answer(how):
    async def scene(bench):
        lane = bench.lanes.all[0]
        for name in "abc":
            bench.submit(name, model=mounted())
        await turn()
        good = [wire.Outcome(200, 1)] * 3
        if how == "too few outcomes":
            lane.finish(good[:2], b"ab")
        elif how == "too many outcomes":
            lane.finish([*good, *good], b"abcabc")
        else:
            lane.finish([wire.Outcome(500, 1), *good[1:]], b"\xffbc")
        lane.revive({1})
        await bench.finish_all()
        assert set(bench.outcomes) == set("abc")
        assert set(bench.times_settled.values()) == {1}

    play(scene)


def test_an_answer_that_cannot_be_told_fails_alone():
    async def scene(bench):
        model = mounted()

        def fail(outcome):
            raise RuntimeError("the connection broke in a new way")

        jobs = [bench.job(name, model=model) for name in "abc"]
        jobs[1].done = fail
        bench.dispatcher.submit(jobs)
        await turn()
        bench.lanes.all[0].finish()
        assert bench.lanes.all[0].alive
        assert [bench.status(name) for name in "ac"] == [200, 200]

    play(scene)


# What is refused


def test_a_full_queue_is_429_and_all_or_nothing():
    async def scene(bench):
        model = mounted()
        bench.submit("first", model=model)
        await turn()
        bench.submit("held", model=model, rows=6)
        with pytest.raises(Refusal) as caught:
            bench.dispatcher.submit([bench.job("a", model=model), bench.job("b", model=model, rows=2)])
        assert caught.value.status == 429
        assert caught.value.headers == {"retry-after": "1"}
        assert bench.dispatcher.queued_rows == 6
        bench.submit("fits", model=model, rows=2)
        await bench.finish_all()
        assert set(bench.outcomes) == {"first", "held", "fits"}
        assert b'fettle_requests_shed_total{model="m",version="1"} 1.0' in bench.metrics.render()

    play(scene, max_queue_rows=8)


def test_the_queue_is_bounded_in_bytes_too_but_one_request_always_fits():
    async def scene(bench):
        model = mounted()
        bench.submit("busy", model=model)
        await turn()
        bench.submit("large", model=model, payload=b"x" * 150)
        with pytest.raises(Refusal, match="too many requests are waiting") as refused:
            bench.submit("small", model=model)
        assert refused.value.status == 429
        await bench.finish_all()
        bench.submit("small", model=model)
        await turn()
        bench.submit("another", model=model, payload=b"x" * 95)
        await bench.finish_all()

    play(scene, max_queue_bytes=100)


@pytest.mark.parametrize("jobs", [1, 9])
def test_a_request_larger_than_the_queue_is_413(jobs):
    async def scene(bench):
        many = [bench.job(number, model=mounted(), rows=9 // jobs) for number in range(jobs)]
        with pytest.raises(Refusal, match="at most 8 rows, got 9") as caught:
            bench.dispatcher.submit(many)
        assert caught.value.status == 413
        assert bench.dispatcher.queued_rows == 0

    play(scene, max_queue_rows=8)


def refused(bench, model, *, within_s):
    """The refusal of a request that wants its answer by then, or None."""
    try:
        bench.dispatcher.admit(model, deadline=time.monotonic() + within_s)
    except Refusal as refusal:
        return refusal
    return None


def test_a_deadline_that_cannot_be_met_is_refused_at_once():
    """20 s of fixed cost and 1 s a row: a full batch of 8 takes 28 s, and nothing here waits for any of it."""

    async def scene(bench):
        model = mounted(times=[(rows, 20.0 + rows) for rows in (1, 2, 4, 8)])
        assert refused(bench, model, within_s=0.1) is None  # a lane is idle: it costs nobody to try
        for lane in range(2):
            bench.submit(f"running {lane}", model=model)
            await turn()
        for number in range(32):
            bench.submit(number, model=model)
        # Two batches of one row run, four full ones wait for two lanes, and then comes its own.
        wait_s = (2 * 21.0 + 4 * 28.0) / 2 + 28.0
        assert refused(bench, model, within_s=wait_s / AIM + 1) is None
        late = refused(bench, model, within_s=(wait_s - 9.5) / AIM)
        assert (late.status, late.headers) == (429, {"retry-after": "10"})
        assert b'fettle_requests_shed_total{model="m",version="1"} 1.0' in bench.metrics.render()
        await bench.finish_all()

    play(scene, lanes=2)


def test_each_version_that_waits_is_counted_with_its_own_times():
    """Batches of up to 8 rows: 28 s for a full one of the slow version, 0.28 s for one of the quick one."""

    async def scene(bench):
        slow = mounted(1, times=[(rows, 20.0 + rows) for rows in (1, 2, 4, 8)])
        quick = mounted(2, times=[(rows, 0.2 + rows / 100) for rows in (1, 2, 4, 8)])
        for lane in range(2):
            bench.submit(f"running {lane}", model=quick)
            await turn()
        for number in range(16):
            bench.submit(f"slow {number}", model=slow)
            bench.submit(f"quick {number}", model=quick)
        # Two quick rows run and two full batches of each wait for two lanes, and then comes its own: a full one where
        # its like waits already.
        before_s = (2 * 0.21 + 2 * 28.0 + 2 * 0.28) / 2
        for model, own_s in ((slow, 28.0), (quick, 0.28), (mounted(3, times=[(1, 5.0)]), 5.0)):
            wait_s = before_s + own_s
            assert refused(bench, model, within_s=wait_s / AIM + 0.2) is None
            assert refused(bench, model, within_s=(wait_s - 0.5) / AIM).status == 429
        await bench.finish_all()

    play(scene, lanes=2)


def test_a_model_that_nothing_is_known_of_is_admitted():
    async def scene(bench):
        model = mounted(row_wise=False, times=())
        assert refused(bench, model, within_s=0.5) is None
        bench.submit("a", model=model)
        bench.submit("b", model=model)
        assert refused(bench, model, within_s=0.5) is None

    play(scene)


def test_a_deadline_that_has_passed_is_refused():
    async def scene(bench):
        assert refused(bench, mounted(), within_s=-0.5).status == 429

    play(scene)


def test_an_idle_server_tries_whatever_it_expects_for_times_learned_in_a_bad_moment_must_be_unlearned():
    async def scene(bench):
        model = mounted(times=[(1, 5.0), (2, 5.5)])
        assert refused(bench, model, within_s=0.5) is None
        bench.submit("busy", model=model)
        await turn()
        assert refused(bench, model, within_s=0.5).status == 429
        await bench.finish_all()
        assert refused(bench, model, within_s=0.5) is None

    play(scene)


def test_answers_that_come_later_than_expected_make_admission_more_careful():
    async def scene(bench):
        model = mounted(times=[(1, 0.001), (8, 0.002)])
        assert refused(bench, model, within_s=0.1) is None
        for number in range(20):
            job = bench.submit(number, model=model)
            job.queued -= 0.2  # as if it had been queued so long ago
            await turn()
            bench.lanes.all[0].finish(took_s=0.001)
        bench.submit("busy", model=model)
        await turn()
        assert refused(bench, model, within_s=0.1).status == 429
        assert refused(bench, model, within_s=0.5) is None
        await bench.finish_all()

    play(scene)


# Deadlines


def test_what_would_end_too_late_leaves_its_place_to_what_would_not():
    async def scene(bench):
        model = mounted(times=[(1, 5.0), (8, 5.001)])
        bench.submit("busy", model=model)
        await turn()
        for number in range(3):
            bench.submit(f"hopeless {number}", model=model, timeout_s=4.0)
        bench.submit("in time", model=model, timeout_s=20.0)
        bench.lanes.all[0].finish(took_s=5.0)
        await turn()
        assert [bench.outcomes[f"hopeless {number}"].status for number in range(3)] == [504, 504, 504]
        await bench.finish_all()
        assert bench.names() == [["busy"], ["in time"]]

    play(scene)


def test_where_all_would_end_too_late_the_last_one_runs_for_estimates_can_be_wrong():
    async def scene(bench):
        model = mounted(times=[(1, 5.0), (8, 5.001)])
        bench.submit("busy", model=model)
        await turn()
        for number in range(3):
            bench.submit(f"hopeless {number}", model=model, timeout_s=4.0)
        bench.lanes.all[0].finish(took_s=5.0)
        await turn()
        await bench.finish_all()
        assert bench.names() == [["busy"], ["hopeless 2"]]

    play(scene)


def test_deadlines_of_queued_and_of_running_jobs_are_kept_within_50_ms():
    async def scene(bench):
        bench.dispatcher.start()
        model = mounted(times=[(1, 0.001), (8, 0.002)])
        jobs = [bench.submit(f"running {number}", model=model, timeout_s=0.04 + number / 50) for number in range(3)]
        await turn()
        jobs += [bench.submit(f"queued {number}", model=model, timeout_s=0.05 + number / 50) for number in range(4)]
        late = bench.submit("late", model=model)
        assert len(bench.lanes.all[0].batch) == 3
        await until(lambda: len(bench.outcomes) == 7)
        assert late.queued
        lags = []
        for job in jobs:
            refusal = bench.outcomes[job.item.request_id]
            assert (refusal.status, refusal.headers) == (504, {"retry-after": "1"})
            lags.append(bench.settled_at[job.item.request_id] - job.deadline)
        assert min(lags) >= 0.0
        assert sorted(lags)[3] < 0.05  # half of them, for a machine that has other things to do
        await bench.finish_all()
        assert bench.names() == [[f"running {number}" for number in range(3)], ["late"]]
        assert set(bench.times_settled.values()) == {1}

    play(scene)


def test_abandoned_jobs_never_reach_a_lane():
    async def scene(bench):
        model = mounted()
        bench.submit("first", model=model)
        await turn()
        jobs = [bench.submit(name, model=model, rows=2) for name in "abcd"]
        for job in (jobs[0], jobs[2]):
            job.abandon()
        await bench.finish_all()
        assert bench.names() == [["first"], ["b", "d"]]
        assert set(bench.outcomes) == {"first", "b", "d"}
        assert bench.dispatcher.queued_rows == 0

    play(scene)


def test_abandoned_jobs_make_room_in_the_queue():
    async def scene(bench):
        bench.dispatcher.start()
        model = mounted()
        bench.submit("first", model=model)
        await turn()
        bench.submit("a", model=model, rows=8).abandon()
        await until(lambda: bench.dispatcher.queued_rows == 0)
        bench.submit("b", model=model, rows=8)
        await bench.finish_all()
        assert bench.names() == [["first"], ["b"]]

    play(scene, max_queue_rows=8)


def test_abandoned_jobs_behind_others_make_room_too():
    async def scene(bench):
        bench.dispatcher.start()
        model = mounted()
        bench.submit("first", model=model)
        await turn()
        bench.submit("a", model=model)
        bench.submit("b", model=model, rows=7, timeout_s=0.0)
        await until(lambda: "b" in bench.outcomes)
        await until(lambda: bench.dispatcher.queued_rows == 1, timeout_s=0.2)
        bench.submit("c", model=model, rows=7)

    play(scene, max_queue_rows=8)


def test_an_answer_that_comes_after_its_client_has_gone_is_dropped():
    async def scene(bench):
        jobs = [bench.submit(name, model=mounted()) for name in "ab"]
        await turn()
        jobs[0].abandon()
        bench.lanes.all[0].finish()
        assert set(bench.outcomes) == {"b"}

    play(scene)


# Workers that die


def test_the_jobs_of_a_lost_lane_go_elsewhere_each_alone():
    async def scene(bench):
        lost, other = bench.lanes.all
        model = mounted()
        other.alive = False
        for name in "abc":
            bench.submit(name, model=model)
        await turn()
        bench.submit("d", model=model)
        bench.submit("e", model=model)
        lost.lose()
        assert bench.dispatcher.queued_rows == 5
        other.revive({1})
        await bench.finish_all()
        assert bench.names(1) == [["a"], ["b"], ["c"], ["d", "e"]]
        assert {bench.status(name) for name in "abcde"} == {200}
        assert bench.dispatcher.queued_rows == 0

    play(scene, lanes=2)


def test_a_job_that_two_workers_died_of_is_500_and_its_neighbors_are_answered():
    async def scene(bench):
        lane = bench.lanes.all[0]
        for name in "abc":
            bench.submit(name, model=mounted())
        await turn()
        lane.lose()
        lane.revive({1})
        await turn()
        lane.finish()
        await turn()
        assert bench.names()[-1] == ["b"]
        lane.lose()
        assert bench.status("b") == 500
        assert "died" in bench.outcomes["b"].message
        lane.revive({1})
        await bench.finish_all()
        assert [bench.status(name) for name in "abc"] == [200, 500, 200]
        assert set(bench.times_settled.values()) == {1}

    play(scene)


def test_a_worker_that_dies_of_a_new_version_casts_no_suspicion_on_its_jobs():
    async def scene(bench):
        lane = bench.lanes.all[0]
        for name in "ab":
            bench.submit(name, model=mounted())
        await turn()
        for _ in range(3):
            lane.lose(trying=True)
            lane.revive({1})
            await turn()
        lane.lose()
        lane.revive({1})
        await turn()
        lane.lose(trying=True)  # and one that is suspected already is acquitted of this death
        lane.revive({1})
        await bench.finish_all()
        assert bench.names() == [*[["a", "b"]] * 4, ["a"], ["a"], ["b"]]
        assert [bench.status(name) for name in "ab"] == [200, 200]

    play(scene)


def test_nobody_waits_for_a_lost_job_that_was_abandoned():
    async def scene(bench):
        lane = bench.lanes.all[0]
        jobs = [bench.submit(name, model=mounted()) for name in "ab"]
        await turn()
        jobs[0].abandon()
        lane.lose()
        lane.revive({1})
        await bench.finish_all()
        assert bench.names() == [["a", "b"], ["b"]]
        assert bench.dispatcher.queued_rows == 0

    play(scene)


def test_the_loss_of_an_idle_lane_changes_nothing():
    async def scene(bench):
        first, second = bench.lanes.all
        first.lose()
        bench.submit("a", model=mounted())
        await bench.finish_all()
        assert bench.names(1) == [["a"]]
        assert not first.sent
        assert second.alive

    play(scene, lanes=2)


def given_up(bench):
    bench.lanes.problem = "worker 0 died 5 times"
    bench.lanes.on_lost(bench.lanes.all[0], None)


def test_once_all_lanes_are_given_up_what_waits_and_what_comes_is_503():
    async def scene(bench):
        model = mounted()
        for name in "ab":
            bench.submit(name, model=model)
        await turn()
        bench.submit("c", model=mounted(2))
        bench.lanes.all[0].lose()
        assert not bench.outcomes
        given_up(bench)
        assert [bench.status(name) for name in "abc"] == [503] * 3
        assert bench.outcomes["a"].headers == {"retry-after": "1"}
        assert refused(bench, model, within_s=20.0).status == 503
        await turn()
        assert bench.dispatcher.queued_rows == 0

    play(scene)


def test_a_request_whose_body_ends_after_all_lanes_were_given_up_is_503():
    async def scene(bench):
        given_up(bench)
        with pytest.raises(Refusal) as caught:
            bench.submit("a", model=mounted())
        assert caught.value.status == 503

    play(scene)


def test_a_worker_that_hangs_is_killed_and_its_jobs_go_on():
    async def scene(bench):
        bench.dispatcher.start()
        lane = bench.lanes.all[0]
        began = time.monotonic()
        bench.submit("a", model=mounted())
        await until(lambda: lane.kills)
        assert time.monotonic() - began >= 0.05
        assert not bench.outcomes
        lane.lose()
        lane.revive({1})
        await bench.finish_all()
        assert bench.names() == [["a"], ["a"]]
        assert bench.status("a") == 200

    play(scene, worker_timeout_s=0.05)


def test_an_idle_worker_is_never_killed_for_hanging():
    async def scene(bench):
        bench.dispatcher.start()
        first, second = bench.lanes.all
        bench.submit("a", model=mounted())
        await turn()
        first.finish()
        first.busy_since = second.busy_since = 0.0
        bench.submit("b", model=mounted(), timeout_s=0.0)
        await until(lambda: "b" in bench.outcomes)
        first.busy_since = time.monotonic()
        assert not second.kills

    play(scene, lanes=2, worker_timeout_s=30.0)


# Versions that go


async def sweep(bench):
    """Until the dispatcher has looked at everything once more: it forgets a version that nobody uses."""
    unused = mounted(99)
    bench.dispatcher.retire(unused)
    await until(lambda: unused in bench.lanes.unmounted)


def test_a_version_is_forgotten_when_its_last_job_has_ended():
    async def scene(bench):
        bench.dispatcher.start()
        lane = bench.lanes.all[0]
        before, now = mounted(1), mounted(2)
        bench.submit("running", model=before)
        await turn()
        bench.submit("waiting", model=before)
        bench.submit("new", model=now)
        bench.dispatcher.retire(before)
        await sweep(bench)
        assert before not in bench.lanes.unmounted
        lane.finish()
        await turn()
        assert bench.names()[-1] == ["waiting"]
        await sweep(bench)
        assert before not in bench.lanes.unmounted
        lane.lose()  # and even now its job must find another worker that has it
        await sweep(bench)
        assert before not in bench.lanes.unmounted
        lane.revive({1, 2})
        await turn()
        assert bench.names()[-1] == ["waiting"]
        lane.finish()
        await until(lambda: before in bench.lanes.unmounted)
        await sweep(bench)
        await bench.finish_all()
        assert bench.lanes.unmounted.count(before) == 1
        assert now not in bench.lanes.unmounted
        assert {bench.status(name) for name in ("running", "waiting", "new")} == {200}

    play(scene)


def test_a_version_that_nobody_uses_is_forgotten_at_once():
    async def scene(bench):
        bench.dispatcher.start()
        model = mounted(1)
        bench.submit("a", model=model)
        await bench.finish_all()
        bench.dispatcher.retire(model)
        await until(lambda: bench.lanes.unmounted == [model])

    play(scene)


def test_a_request_for_a_version_that_was_just_forgotten_is_refused_at_once():
    """Its body was still being unpacked on a thread while the server switched."""

    async def scene(bench):
        bench.dispatcher.start()
        model = mounted(1)
        bench.dispatcher.admit(model, deadline=time.monotonic() + 20)
        bench.dispatcher.retire(model)
        await until(lambda: bench.lanes.unmounted == [model])
        with pytest.raises(Refusal) as caught:
            bench.submit("a", model=model)
        assert caught.value.status == 503

    play(scene)


def test_close_refuses_everything_with_503():
    async def scene(bench):
        bench.dispatcher.start()
        model = mounted()
        bench.submit("running", model=model)
        await turn()
        bench.submit("waiting", model=model)
        bench.submit("other", model=mounted(2), kind="binary")
        bench.dispatcher.close()
        assert [bench.status(name) for name in ("running", "waiting", "other")] == [503] * 3
        assert bench.dispatcher.queued_rows == 0
        with pytest.raises(Refusal) as caught:
            bench.submit("late", model=model)
        assert (caught.value.status, caught.value.headers) == (503, {"retry-after": "1"})
        assert refused(bench, model, within_s=20.0).status == 503
        await bench.finish_all()
        assert bench.names() == [["running"]]
        assert set(bench.times_settled.values()) == {1}

    play(scene)


# All of it together

events = st.one_of(
    st.tuples(
        st.just("submit"),
        st.integers(1, 2),
        st.lists(st.integers(1, 6), min_size=1, max_size=3),
        st.sampled_from(["json", "binary"]),
    ),
    st.tuples(st.just("finish"), st.integers(0, 2)),
    st.tuples(st.just("lose"), st.integers(0, 2)),
    st.tuples(st.just("revive"), st.integers(0, 2)),
    st.tuples(st.just("abandon"), st.integers(0, 1000)),
    st.tuples(st.just("turn")),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(events, max_size=60), st.integers(1, 3))
def test_every_job_is_settled_once_and_with_its_own_answer(script, count):
    async def scene(bench):
        models = {1: mounted(1), 2: mounted(2)}
        jobs, queues, abandoned, deaths = {}, {}, set(), Counter()

        def lose(lane):
            if lane.alive:
                for job in lane.batch or ():
                    deaths[job.item.request_id] += 1
                lane.lose()

        for event, *given_by in script:
            lane = bench.lanes.all[given_by[0] % count] if event in ("finish", "lose", "revive") else None
            if event == "submit":
                key, rows, kind = given_by
                several = [
                    bench.job(f"{len(jobs) + n}", model=models[key], rows=r, kind=kind) for n, r in enumerate(rows)
                ]
                jobs |= {job.item.request_id: job for job in several}
                queues.setdefault((key, kind), []).extend(job.item.request_id for job in several)
                bench.dispatcher.submit(several)
            elif event == "finish" and lane.batch is not None:
                lane.finish()
            elif event == "lose":
                lose(lane)
            elif event == "revive" and not lane.alive:
                lane.revive({1, 2})
            elif event == "abandon" and jobs:
                name = str(given_by[0] % len(jobs))
                if name not in bench.outcomes:
                    abandoned.add(name)
                    jobs[name].abandon()
            elif event == "turn":
                await turn()
        for lane in bench.lanes.all:
            if not lane.alive:
                lane.revive({1, 2})
        await bench.finish_all()

        assert bench.dispatcher.queued_rows == 0
        assert set(bench.outcomes) == set(jobs) - abandoned
        assert set(bench.times_settled.values()) <= {1}
        for name, outcome in bench.outcomes.items():
            if deaths[name] == 2:
                assert outcome.status == 500
            else:
                assert isinstance(outcome, Result)
                assert outcome.content == name.encode()
        sent = sorted((work.id, work, payloads) for lane in bench.lanes.all for work, payloads in lane.sent)
        seen, first = Counter(), {}
        for _, work, payloads in sent:
            names = [payload.decode() for payload in payloads]
            assert {(jobs[name].model.key, jobs[name].kind) for name in names} == {(work.key, work.kind)}
            assert len(names) == 1 or sum(jobs[name].rows for name in names) <= bench.options.max_batch_rows
            assert all(not seen[name] for name in names) or len(names) == 1
            first.setdefault((work.key, work.kind), []).extend(name for name in names if not seen[name])
            seen.update(names)
        assert all(seen[name] == min(2, deaths[name] + 1) or name in abandoned for name in jobs)
        for queue, names in first.items():
            kept = set(names)
            assert names == [name for name in queues[queue] if name in kept]

    play(scene, lanes=count, max_queue_rows=10_000)


def test_the_wait_that_is_told_is_at_least_a_second():
    async def scene(bench):
        model = mounted(times=[(1, 3.0), (2, 3.5)])
        bench.submit("busy", model=model)
        await turn()
        assert refused(bench, model, within_s=6.0 / AIM - 0.1).headers["retry-after"] == "1"
        await bench.finish_all()

    play(scene)


def test_jobs_are_told_by_version_while_they_wait_and_while_they_run():
    async def scene(bench):
        first, second = mounted(1), mounted(2)
        bench.submit("runs", model=first)
        await turn()
        bench.submit("waits", model=first)
        bench.submit("waits too", model=second)
        assert bench.dispatcher.jobs() == {("m", "1"): 2, ("m", "2"): 1}
        await bench.finish_all()
        assert not bench.dispatcher.jobs()

    play(scene)
