"""The batcher with models written in Python, so that the tests decide when an inference ends."""

import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.core.runner import Runner
from fettle.core.signature import Signature, TensorSpec
from fettle.serve.batching import Batcher, Job
from fettle.serve.metrics import Metrics
from fettle.serve.model import LoadedModel, ModelFault
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal


def signature(*, first="batch", width="n"):
    return Signature(
        inputs=(TensorSpec(name="x", dtype="float64", shape=(first, width)),),
        outputs=(TensorSpec(name="y", dtype="float64", shape=(first, width)),),
        activation="softmax",
    )


class Calls(Runner):
    """x * factor + 1, noting each batch; rows that hold 666 raise; waits for `gate` where it is closed."""

    def __init__(self, factor=2.0, *, spoil=None, **options):
        super().__init__(signature(**options))
        self.factor = factor
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.spoil = spoil

    def run(self, inputs):
        x = inputs["x"]
        self.batches.append(x.shape)
        self.entered.set()
        assert self.gate.wait(20)
        if (x == 666).any():
            raise RuntimeError("bad row")
        y = x * self.factor + 1
        return {"y": y if self.spoil is None else self.spoil(y)}


def loaded(runner, version=1, *, row_wise=True):
    return LoadedModel(
        name="m",
        version=version,
        digest="d" * 64,
        runtime="python",
        precision="float",
        signature=runner.signature,
        runner=runner,
        row_wise=row_wise,
        classifies=row_wise,
    )


def job_of(model, x, *, timeout_s=20.0, prepare=None, finish=None):
    return Job(
        model=model,
        rows=len(x),
        shape=x.shape[1:],
        prepare=prepare or (lambda: {"x": x}),
        finish=finish or (lambda answer: answer),
        deadline=time.monotonic() + timeout_s,
    )


def batcher_of(*, workers=1, max_batch_rows=8, max_queue_rows=64, metrics=None):
    options = ServeOptions(workers=workers, max_batch_rows=max_batch_rows, max_queue_rows=max_queue_rows)
    return Batcher(options=options, metrics=metrics or Metrics())


def rows(*values):
    return np.array([[float(value)] for value in values])


async def wait_for(event):
    assert await asyncio.to_thread(event.wait, 20)


async def busy(batcher, runner, model):
    """Let the only worker hang in an inference; the future of that job."""
    runner.gate.clear()
    runner.entered.clear()
    (future,) = batcher.submit([job_of(model, rows(0))])
    await wait_for(runner.entered)
    return future


@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 1), st.booleans(), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    ),
    workers=st.integers(1, 3),
)
def test_batched_answers_are_those_of_one_by_one(arrivals, workers):
    """Random rows, widths, models, poison and pauses: every job gets exactly its own answer."""
    runners = [Calls(2.0), Calls(-3.0)]
    models = [loaded(runner, version) for version, runner in enumerate(runners, 1)]
    batcher = batcher_of(workers=workers, max_batch_rows=8, max_queue_rows=10_000)

    async def play():
        waiting = []
        for number, (count, width, which, poisoned, pause) in enumerate(arrivals):
            x = np.random.default_rng(number).normal(size=(count, width))
            if poisoned:
                x[-1, -1] = 666
            waiting.append((x, which, poisoned, batcher.submit([job_of(models[which], x)])[0]))
            for _ in range(pause):
                await asyncio.sleep(0)
        for x, which, poisoned, future in waiting:
            if poisoned:
                with pytest.raises(Refusal) as caught:
                    await future
                assert caught.value.status == 500
                continue
            answer = await future
            expected = x * runners[which].factor + 1
            np.testing.assert_array_equal(answer.outputs["y"], expected)
            powers = np.exp(expected - expected.max(axis=1, keepdims=True))
            np.testing.assert_allclose(answer.probabilities, powers / powers.sum(axis=1, keepdims=True))
            np.testing.assert_allclose(answer.statistics[:, 0], x.mean(axis=1), rtol=1e-5, atol=1e-6)
        assert batcher.queued_rows == 0

    asyncio.run(play())
    assert batcher.close(10)
    assert all(shape[0] <= 8 for runner in runners for shape in runner.batches)


def test_what_waits_is_taken_together_up_to_the_maximum():
    runner = Calls()
    model = loaded(runner)
    batcher = batcher_of(max_batch_rows=8)

    async def play():
        first = await busy(batcher, runner, model)
        others = batcher.submit([job_of(model, rows(i)) for i in range(11)])
        runner.gate.set()
        await asyncio.gather(first, *others)

    asyncio.run(play())
    assert [shape[0] for shape in runner.batches] == [1, 8, 3]
    assert batcher.close(10)


def test_a_lone_request_does_not_wait_for_company():
    runner = Calls()
    batcher = batcher_of()
    asyncio.run(_answer(batcher, job_of(loaded(runner), rows(1))))
    assert runner.batches == [(1, 1)]
    assert batcher.close(10)


async def _answer(batcher, job):
    return await batcher.submit([job])[0]


@pytest.mark.parametrize("kind", ["shape", "model", "fixed"])
def test_what_differs_is_never_merged(kind):
    runner = Calls()
    other = Calls() if kind == "model" else runner
    row_wise = kind != "fixed"
    model = loaded(runner, row_wise=row_wise)
    second = loaded(other) if kind == "model" else model
    x = np.ones((1, 2)) if kind == "shape" else rows(1)
    batcher = batcher_of()

    async def play():
        first = await busy(batcher, runner, model)
        others = batcher.submit([job_of(model, rows(1)), job_of(second, x), job_of(model, rows(1))])
        runner.gate.set()
        await asyncio.gather(first, *others)

    asyncio.run(play())
    counts = [shape[0] for shape in runner.batches]
    assert counts == {"shape": [1, 2, 1], "model": [1, 2], "fixed": [1, 1, 1, 1]}[kind]
    assert batcher.close(10)


def test_the_oldest_waits_no_longer_than_its_turn():
    """A stream of another shape cannot starve a job: the oldest always leads the next batch."""
    runner = Calls()
    model = loaded(runner)
    batcher = batcher_of(max_batch_rows=2)

    async def play():
        first = await busy(batcher, runner, model)
        jobs = [job_of(model, rows(1)), job_of(model, np.ones((1, 2))), *(job_of(model, rows(1)) for _ in range(6))]
        others = batcher.submit(jobs)
        runner.gate.set()
        await asyncio.gather(first, *others)

    asyncio.run(play())
    assert runner.batches[2] == (1, 2)
    assert batcher.close(10)


def test_a_full_queue_is_429_and_all_or_nothing():
    runner = Calls()
    model = loaded(runner)
    metrics = Metrics()
    batcher = batcher_of(max_queue_rows=8, metrics=metrics)

    async def play():
        first = await busy(batcher, runner, model)
        held = batcher.submit([job_of(model, rows(*range(6)))])
        with pytest.raises(Refusal) as caught:
            batcher.submit([job_of(model, rows(1)), job_of(model, rows(1, 2))])
        assert caught.value.status == 429
        assert caught.value.headers == {"retry-after": "1"}
        assert batcher.queued_rows == 6
        held += batcher.submit([job_of(model, rows(1, 2))])
        with pytest.raises(Refusal, match="at most 8 rows"):
            batcher.submit([job_of(model, rows(*range(9)))])
        runner.gate.set()
        await asyncio.gather(first, *held)

    asyncio.run(play())
    assert b"fettle_requests_shed_total 1.0" in metrics.render()
    assert batcher.close(10)


@pytest.mark.parametrize("how", ["cancelled", "too late"])
def test_abandoned_work_is_not_computed(how):
    runner = Calls()
    model = loaded(runner)
    batcher = batcher_of()

    async def play():
        first = await busy(batcher, runner, model)
        (future,) = batcher.submit([job_of(model, rows(5), timeout_s=0.0 if how == "too late" else 20.0)])
        if how == "cancelled":
            future.cancel()
        runner.gate.set()
        await first
        await batcher.submit([job_of(model, rows(7))])[0]
        assert future.cancelled() or not future.done()
        assert batcher.queued_rows == 0

    asyncio.run(play())
    assert sum(shape[0] for shape in runner.batches) == 2
    assert batcher.close(10)


def test_an_item_that_cannot_be_prepared_fails_alone():
    runner = Calls()
    model = loaded(runner)
    batcher = batcher_of()

    def refuse():
        raise Refusal(400, "not an image")

    def crash():
        raise ValueError("secret")

    async def play():
        first = await busy(batcher, runner, model)
        jobs = [
            job_of(model, rows(1)),
            job_of(model, rows(2), prepare=refuse),
            job_of(model, rows(3), prepare=crash),
            job_of(model, rows(4)),
            job_of(model, rows(5), finish=lambda answer: refuse()),
        ]
        futures = batcher.submit(jobs)
        runner.gate.set()
        await first
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [getattr(r, "status", 200) for r in results] == [200, 400, 500, 200, 400]
        assert "secret" not in results[2].message
        assert results[3].outputs["y"].tolist() == [[9.0]]

    asyncio.run(play())
    assert batcher.close(10)


@pytest.mark.parametrize(
    "spoil", [lambda y: y[:-1], lambda y: y[:, 0], lambda y: y.astype(np.float32), lambda y: np.concatenate([y, y])]
)
def test_outputs_of_another_shape_are_a_fault_not_an_answer(spoil):
    batcher = batcher_of()
    with pytest.raises(Refusal, match="output 'y'") as caught:
        asyncio.run(_answer(batcher, job_of(loaded(Calls(spoil=spoil)), rows(1, 2))))
    assert caught.value.status == 500
    assert batcher.close(10)


def test_a_missing_output_is_a_fault():
    runner = Calls()
    runner.run = lambda inputs: {}
    batcher = batcher_of()
    with pytest.raises(Refusal, match="no output 'y'"):
        asyncio.run(_answer(batcher, job_of(loaded(runner), rows(1))))
    assert batcher.close(10)


def test_a_worker_survives_what_is_no_exception():
    runner = Calls()

    def collapse(inputs):
        raise KeyboardInterrupt

    batcher = batcher_of()
    broken = Calls()
    broken.run = collapse
    with pytest.raises(Refusal):
        asyncio.run(_answer(batcher, job_of(loaded(broken), rows(1))))
    assert asyncio.run(_answer(batcher, job_of(loaded(runner), rows(1)))).outputs["y"].tolist() == [[3.0]]
    assert batcher.close(10)


def test_close_finishes_what_waits_and_refuses_what_comes():
    runner = Calls()
    model = loaded(runner)
    batcher = batcher_of()

    async def play():
        first = await busy(batcher, runner, model)
        others = batcher.submit([job_of(model, rows(i)) for i in range(5)])
        closing = asyncio.create_task(asyncio.to_thread(batcher.close, 10))
        while not batcher._closed:
            await asyncio.sleep(0)
        with pytest.raises(Refusal) as caught:
            batcher.submit([job_of(model, rows(1))])
        assert caught.value.status == 503
        runner.gate.set()
        assert len(await asyncio.gather(first, *others)) == 6
        assert await closing

    asyncio.run(play())


def test_close_says_when_a_worker_hangs():
    runner = Calls()
    batcher = batcher_of()

    async def play():
        future = await busy(batcher, runner, loaded(runner))
        assert not await asyncio.to_thread(batcher.close, 0.05)
        runner.gate.set()
        await future

    asyncio.run(play())
    assert batcher.close(10)


def test_large_jobs_run_in_pieces():
    runner = Calls()
    batcher = batcher_of(max_batch_rows=4)
    x = rows(*range(11))
    answer = asyncio.run(_answer(batcher, job_of(loaded(runner), x)))
    np.testing.assert_array_equal(answer.outputs["y"], x * 2 + 1)
    assert [shape[0] for shape in runner.batches] == [4, 4, 3]
    assert batcher.close(10)


def test_model_faults_reach_the_client_in_words():
    def finish(answer):
        raise ModelFault("the model answered NaN")

    batcher = batcher_of()
    with pytest.raises(Refusal, match="answered NaN"):
        asyncio.run(_answer(batcher, job_of(loaded(Calls()), rows(1), finish=finish)))
    assert batcher.close(10)
