"""Batches with models written in Python: what comes out is what one request at a time would have given."""

import base64
import io
import json
import logging

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fettle.core.runner import Runner
from fettle.core.signature import ImagePreprocess, Signature, TensorSpec
from fettle.core.statistics import input_statistics
from fettle.serve import execute as module
from fettle.serve import wire
from fettle.serve.execute import execute
from fettle.serve.model import LoadedModel, is_classifier, is_row_wise
from fettle.serve.refusal import Refusal

IMAGE = ImagePreprocess(mode="RGB", resize=8, crop=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """Failures are told to the log with their traceback, and most of these tests are about failures."""
    logger = logging.getLogger("fettle.serve")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def signature(*, first="batch", inputs=("n",), outputs=("n",)):
    return Signature(
        inputs=(TensorSpec(name="x", dtype="float64", shape=(first, *inputs)),),
        outputs=(TensorSpec(name="y", dtype="float64", shape=(first, *outputs)),),
        activation="softmax",
    )


class Calls(Runner):
    """x * 2 + 1, noting each batch; 666 raises, and 777 becomes NaN; `spoil` may change what comes out."""

    def __init__(self, given=None, *, spoil=None):
        super().__init__(given or signature())
        self.batches = []
        self.spoil = spoil

    def run(self, inputs):
        x = inputs["x"]
        self.batches.append(x.shape)
        if (x == 666).any():
            raise RuntimeError("secret: failed in /srv/secret/place")
        y = np.where(x == 777, np.nan, x * 2 + 1)
        return {"y": y if self.spoil is None else self.spoil(y)}


class Means(Runner):
    """Of an image, the mean of each color; noting each batch."""

    def __init__(self):
        given = Signature(
            inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3, 8, 8)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
            classes=("red", "green", "blue"),
            activation="softmax",
            image=IMAGE,
        )
        super().__init__(given)
        self.batches = []

    def run(self, inputs):
        self.batches.append(inputs["x"].shape)
        return {"y": inputs["x"].mean(axis=(2, 3))}


def loaded(runner):
    return LoadedModel(
        name="m",
        version=1,
        digest="d" * 64,
        runtime="python",
        precision="float",
        signature=runner.signature,
        runner=runner,
        row_wise=is_row_wise(runner.signature),
        classifies=is_classifier(runner.signature),
    )


def json_of(x):
    datatype = {"float64": "FP64", "float32": "FP32"}[x.dtype.name]
    tensor = {"name": "x", "shape": list(x.shape), "datatype": datatype, "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode(), 0


def binary_of(x):
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP64", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + x.tobytes(), len(head)


FORMS = {"json": json_of, "binary": binary_of}


def work_of(kind, parts, *, observe=False, max_rows=1000, encoded=()):
    """Work for (payload, header_bytes) of each item; `encoded` are the indexes of images in base64."""
    items = [
        wire.Item(f"r{number}", len(payload), number in encoded, header_bytes)
        for number, (payload, header_bytes) in enumerate(parts)
    ]
    return wire.Work(1, 1, kind, items, observe, 1_000_000, max_rows)


def run(runner, kind, parts, *, max_batch_rows=8, **options):
    work = work_of(kind, parts, **options)
    return execute(work, [memoryview(payload) for payload, _ in parts], loaded(runner), max_batch_rows=max_batch_rows)


def unpacked(batch):
    """(status, content, header_bytes, probabilities, statistics) of each item, cut as the wire says."""
    outcomes, parts = batch.packed()
    body, start, found = b"".join(parts), 0, []
    for outcome in outcomes:
        content = body[start : start + outcome.size]
        start += outcome.size
        rows, classes = outcome.rows, outcome.classes
        numbers = np.frombuffer(body[start : start + 4 * rows * (classes + wire.STATISTICS)], np.float32)
        start += numbers.nbytes
        probabilities = numbers[: rows * classes].reshape(rows, classes)
        statistics = numbers[rows * classes :].reshape(rows, wire.STATISTICS)
        found.append((outcome.status, content, outcome.header_bytes, probabilities, statistics))
    assert start == len(body)
    return found


def output_of(content, header_bytes=0):
    """The array in an answer."""
    answer = json.loads(content[: header_bytes or None])
    (tensor,) = answer["outputs"]
    if header_bytes:
        return np.frombuffer(content[header_bytes:], np.float64).reshape(tensor["shape"])
    return np.array(tensor["data"]).reshape(tensor["shape"])


def statuses(batch):
    return [outcome.status for outcome in batch.packed()[0]]


def rows(*values):
    return np.array([[float(value)] for value in values])


arrivals = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from(["good", "good", "good", "raises", "nan", "bad"])),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(arrivals, st.sampled_from(["json", "binary"]), st.integers(1, 12), st.booleans())
def test_batched_answers_are_those_of_one_by_one(arrived, kind, max_batch_rows, observe):
    """Random rows, widths and poison: every item gets exactly its own answer."""
    parts, inputs = [], []
    for number, (count, width, what) in enumerate(arrived):
        x = np.random.default_rng(number).normal(size=(count, width))
        if what in ("raises", "nan"):
            x[-1, -1] = {"raises": 666, "nan": 777}[what]
        inputs.append(x)
        payload, header_bytes = FORMS[kind](x)
        parts.append((payload[:-1], header_bytes) if what == "bad" else (payload, header_bytes))
    runner = Calls()
    options = {"max_batch_rows": max_batch_rows, "observe": observe}
    together = unpacked(run(runner, kind, parts, **options))
    assert all(shape[0] <= max_batch_rows for shape in runner.batches)
    for part, x, (_, _, what), found in zip(parts, inputs, arrived, together, strict=True):
        (alone,) = unpacked(run(Calls(), kind, [part], **options))
        assert found[:3] == alone[:3]
        np.testing.assert_array_equal(found[3], alone[3])
        np.testing.assert_array_equal(found[4], alone[4])
        status, content, header_bytes, probabilities, statistics = found
        assert status == {"good": 200, "raises": 500, "nan": 500 if kind == "json" else 200, "bad": 400}[what]
        assert b"secret" not in content
        if what == "good":
            y = x * 2 + 1
            np.testing.assert_array_equal(output_of(content, header_bytes), y)
            assert len(probabilities) == (len(x) if observe else 0)
            if observe:
                powers = np.exp(y - y.max(axis=1, keepdims=True))
                np.testing.assert_allclose(probabilities, powers / powers.sum(axis=1, keepdims=True), rtol=1e-5)
                np.testing.assert_allclose(statistics[:, 0], x.mean(axis=1), rtol=1e-5, atol=1e-6)


def test_requests_of_one_shape_run_as_one_batch_and_others_beside():
    runner = Calls()
    shapes = [(1, 1), (1, 2), (2, 1), (1, 2), (1, 1)]
    batch = run(runner, "json", [json_of(np.ones(shape)) for shape in shapes])
    assert runner.batches == [(4, 1), (2, 2)]
    assert batch.rows == 6
    assert batch.seconds > 0
    assert [output_of(content).shape for _, content, *_ in unpacked(batch)] == shapes


class Prepared(Calls):
    """Notes the memory that batches are put together in."""

    def __init__(self):
        super().__init__()
        self.made, self.taken = [], []

    def empty(self, name, shape):
        self.made.append(super().empty(name, shape))
        return self.made[-1]

    def run(self, inputs):
        self.taken.append(inputs["x"])
        return super().run(inputs)


@pytest.mark.parametrize("kind", ["json", "binary"])
def test_a_batch_is_put_together_in_memory_that_the_engine_need_not_copy(kind):
    runner = Prepared()
    parts = [FORMS[kind](rows(*values)) for values in ([1, 2], [3], [4, 5, 6])]
    batch = run(runner, kind, parts, max_batch_rows=4)
    assert statuses(batch) == [200, 200, 200]
    (made,) = runner.made
    assert made.ravel().tolist() == [1, 2, 3, 4, 5, 6]
    assert [taken.shape for taken in runner.taken] == [(4, 1), (2, 1)]
    assert all(np.shares_memory(taken, made) for taken in runner.taken)
    run(runner, kind, parts[:1])
    assert len(runner.made) == 1, "one request alone is as it came"


def test_where_the_engine_fails_on_a_batch_its_items_run_one_by_one():
    runner = Calls()
    batch = run(runner, "json", [json_of(rows(1)), json_of(rows(666)), json_of(rows(3, 4))])
    assert runner.batches == [(4, 1), (1, 1), (1, 1), (2, 1)]
    found = unpacked(batch)
    assert [status for status, *_ in found] == [200, 500, 200]
    assert found[1][1] == b"the model failed on this input"
    assert output_of(found[2][1]).tolist() == [[7.0], [9.0]]
    assert batch.rows == 3  # of those that were answered


@pytest.mark.parametrize(
    ("payload", "says"),
    [(b"", b"empty"), (b"{", b"JSON"), (json_of(np.ones((1, 1), np.float32))[0], b"must be float64")],
)
def test_an_item_that_cannot_be_read_fails_alone(payload, says):
    runner = Calls()
    found = unpacked(run(runner, "json", [json_of(rows(1)), (payload, 0), json_of(rows(2))]))
    assert [status for status, *_ in found] == [200, 400, 200]
    assert says in found[1][1]
    assert runner.batches == [(2, 1)]


def test_a_batch_in_which_nothing_can_be_read_does_not_run():
    runner = Calls()
    batch = run(runner, "json", [(b"{", 0), (b"[", 0)])
    assert statuses(batch) == [400, 400]
    assert not runner.batches
    assert (batch.rows, batch.seconds) == (0, 0.0)


def test_nan_is_a_fault_in_json_and_its_neighbors_are_answered():
    runner = Calls()
    found = unpacked(run(runner, "json", [json_of(rows(1)), json_of(rows(2, 777)), json_of(rows(3))]))
    assert [status for status, *_ in found] == [200, 500, 200]
    assert b"NaN or infinity in output 'y'" in found[1][1]
    assert runner.batches == [(4, 1)]


@pytest.mark.parametrize(
    "spoil", [lambda y: y[:-1], lambda y: y[:, 0], lambda y: y.astype(np.float32), lambda y: np.concatenate([y, y])]
)
def test_outputs_of_another_shape_are_a_fault_not_an_answer(spoil):
    found = unpacked(run(Calls(spoil=spoil), "json", [json_of(rows(1, 2)), json_of(rows(3))]))
    for status, content, *_ in found:
        assert status == 500
        assert b"output 'y'" in content


def test_a_missing_output_is_a_fault():
    runner = Calls()
    runner.run = lambda inputs: {}
    ((status, content, *_),) = unpacked(run(runner, "json", [json_of(rows(1))]))
    assert (status, content) == (500, b"the model gave no output 'y'")


def test_a_worker_survives_what_is_no_exception():
    """A panic in a library that is written in Rust, for one, comes as a BaseException."""
    runner = Calls()

    def collapse(inputs):
        raise SystemExit(3)

    runner.run = collapse
    assert statuses(run(runner, "json", [json_of(rows(1))])) == [500]


@pytest.mark.parametrize("kind", ["json", "binary"])
def test_more_rows_than_the_queue_may_hold_are_413(kind):
    """The server counts rows by a glance at the body; here they are counted rightly."""
    runner = Calls()
    parts = [FORMS[kind](x) for x in (rows(1, 2, 3), rows(1, 2, 3, 4))]
    found = unpacked(run(runner, kind, parts, max_rows=3))
    assert [status for status, *_ in found] == [200, 413]
    assert found[1][1] == b"a request may have at most 3 rows, got 4"
    assert runner.batches == [(3, 1)]


def test_large_requests_run_in_pieces():
    runner = Calls()
    x = rows(*range(11))
    ((status, content, *_),) = unpacked(run(runner, "json", [json_of(x)], max_batch_rows=4))
    assert status == 200
    np.testing.assert_array_equal(output_of(content), x * 2 + 1)
    assert [shape[0] for shape in runner.batches] == [4, 4, 3]


def test_what_is_observed_of_large_requests_and_their_neighbors_is_of_each_row():
    x, z = rows(*range(5)), rows(7)
    found = unpacked(run(Calls(), "json", [json_of(x), json_of(z)], max_batch_rows=4, observe=True))
    np.testing.assert_array_equal(found[0][4], input_statistics(x))
    np.testing.assert_array_equal(found[1][4], input_statistics(z))
    assert [len(one[3]) for one in found] == [5, 1]


@pytest.mark.parametrize("observe", [True, False])
def test_only_what_is_wanted_is_observed(observe):
    batch = run(Calls(), "json", [json_of(np.ones((2, 3)))], observe=observe)
    (outcome,), parts = batch.packed()
    assert (outcome.rows, outcome.classes) == ((2, 3) if observe else (0, 0))
    assert len(b"".join(parts)) == outcome.size + (4 * 2 * (3 + 5) if observe else 0)


def test_what_is_no_classifier_is_not_observed():
    runner = Calls(signature(inputs=("n", "m"), outputs=("n", "m")))
    batch = run(runner, "json", [json_of(np.ones((2, 3, 1)))], observe=True)
    (outcome,), _ = batch.packed()
    assert (outcome.status, outcome.rows, outcome.classes) == (200, 0, 0)


def test_a_model_of_a_fixed_batch_runs_each_request_by_itself():
    runner = Calls(signature(first=2))
    batch = run(runner, "json", [json_of(rows(1, 2)), json_of(rows(3, 4)), json_of(rows(5))], max_batch_rows=1)
    found = unpacked(batch)
    assert [status for status, *_ in found] == [200, 200, 400]
    assert runner.batches == [(2, 1), (2, 1)]
    assert output_of(found[1][1]).tolist() == [[7.0], [9.0]]


def test_a_classifier_whose_rows_are_not_those_of_its_input_keeps_to_the_layout():
    """One text of many words in, one row of class scores for each word out."""
    x = TensorSpec(name="x", dtype="float64", shape=(1, "words"))
    y = TensorSpec(name="y", dtype="float64", shape=("words", 2))
    runner = Calls(Signature(inputs=(x,), outputs=(y,), activation="softmax"))
    runner.run = lambda inputs: {"y": np.stack([inputs["x"][0], -inputs["x"][0]], axis=1)}
    assert loaded(runner).classifies
    assert not loaded(runner).row_wise
    (outcome,), parts = run(runner, "json", [json_of(np.ones((1, 4)))], observe=True).packed()
    assert outcome.status == 200
    assert len(b"".join(parts)) == outcome.size + 4 * outcome.rows * (outcome.classes + wire.STATISTICS)


def test_a_classifier_of_single_numbers_can_be_observed():
    x = TensorSpec(name="x", dtype="float64", shape=("batch",))
    y = TensorSpec(name="y", dtype="float64", shape=("batch", 2))
    runner = Calls(Signature(inputs=(x,), outputs=(y,), activation="softmax"))
    runner.run = lambda inputs: {"y": np.stack([inputs["x"], -inputs["x"]], axis=1)}
    batch = run(runner, "json", [json_of(np.array([1.0, 2.0, 4.0]))], observe=True)
    ((status, _, _, probabilities, statistics),) = unpacked(batch)
    assert status == 200
    assert len(probabilities) == 3
    assert statistics[:, 0].tolist() == [1.0, 2.0, 4.0]
    assert statistics[:, 4].tolist() == [0.0, 0.0, 0.0]


def picture(color, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (20, 12), color).save(file, kind)
    return file.getvalue()


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_one_broken_image_among_good_ones_fails_alone():
    runner = Means()
    good = [picture(color) for color in COLORS]
    contents = [good[0], b"no image", good[1], good[2][:60], b"", base64.b64encode(good[2]), b"!!!"]
    batch = run(runner, "image", [(content, 0) for content in contents], encoded=(5, 6), observe=True)
    found = unpacked(batch)
    assert [status for status, *_ in found] == [200, 400, 200, 400, 400, 200, 400]
    assert runner.batches == [(3, 3, 8, 8)]
    assert batch.rows == 3
    for index, number in enumerate((0, 2, 5)):
        _, content, header_bytes, probabilities, statistics = found[number]
        answer = json.loads(content)
        assert (answer["index"], answer["class"]) == (index, ("red", "green", "blue")[index])
        assert answer["request_id"] == f"r{number}"
        assert header_bytes == 0
        np.testing.assert_allclose(probabilities[0], answer["probabilities"], rtol=1e-6)
        assert statistics.shape == (1, 5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "BMP", "broken"])), min_size=1))
def test_images_together_are_what_each_is_alone(pictures):
    parts = [
        (b"\x89PNG broken" if kind == "broken" else picture((level, 0, 255 - level), kind), 0)
        for level, kind in pictures[:10]
    ]
    together = unpacked(run(Means(), "image", parts, observe=True, max_batch_rows=4))
    for number, (part, found) in enumerate(zip(parts, together, strict=True)):
        (alone,) = unpacked(run(Means(), "image", [part], observe=True))
        assert found[0] == alone[0]
        assert found[1].replace(f'"r{number}"'.encode(), b'"r0"') == alone[1]
        np.testing.assert_array_equal(found[3], alone[3])
        np.testing.assert_array_equal(found[4], alone[4])


def test_images_are_decoded_into_memory_that_the_engine_need_not_copy():
    class Own(Means):
        def empty(self, name, shape):
            self.made = super().empty(name, shape)
            return self.made

        def run(self, inputs):
            assert np.shares_memory(inputs["x"], self.made)
            return super().run(inputs)

    parts = [(picture((color, 0, 0)), 0) for color in (10, 250)]
    assert statuses(run(Own(), "image", parts)) == [200, 200]


def test_an_image_for_which_the_model_answers_nan_fails_alone():
    runner = Means()

    def run_badly(inputs):
        y = inputs["x"].mean(axis=(2, 3))
        y[1] = np.nan
        return {"y": y}

    runner.run = run_badly
    found = unpacked(run(runner, "image", [(picture(color), 0) for color in COLORS]))
    assert [status for status, *_ in found] == [200, 500, 200]
    assert found[1][1] == b"the model answered NaN or infinity, which is no probability"


def test_an_image_that_is_too_large_is_413():
    payload = picture(COLORS[0])
    work = msgspec.structs.replace(work_of("image", [(payload, 0)] * 2), max_image_pixels=100)
    batch = execute(work, [memoryview(payload)] * 2, loaded(Means()), max_batch_rows=8)
    assert statuses(batch) == [413, 413]


def test_images_for_a_model_that_takes_none_are_refused():
    """The server asks first: here it is a mistake of its own, and so for the worker to tell."""
    with pytest.raises(Refusal) as caught:
        run(Calls(), "image", [(picture(COLORS[0]), 0)])
    assert caught.value.status == 422


def test_the_layout_is_content_then_probabilities_then_statistics():
    x = np.array([[1.0, 2.0], [3.0, 5.0]])
    batch = run(Calls(), "binary", [binary_of(x), (b"", 0), binary_of(x[:1])], observe=True)
    outcomes, parts = batch.packed()
    body = b"".join(parts)
    y = x * 2 + 1
    powers = np.exp(y - y.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    assert [(one.status, one.rows, one.classes) for one in outcomes] == [(200, 2, 2), (400, 0, 0), (200, 1, 2)]
    first, bad, last = outcomes
    assert body[first.header_bytes : first.size] == y.tobytes()
    rest = body[first.size :]
    assert rest[:16] == probabilities.tobytes()
    assert rest[16:56] == input_statistics(x).tobytes()
    rest = rest[56 + bad.size :]
    assert rest[last.header_bytes : last.size] == y[:1].tobytes()
    assert rest[last.size :] == probabilities[:1].tobytes() + input_statistics(x[:1]).tobytes()


def test_an_answer_that_does_not_fit_into_a_frame_is_413_and_its_neighbors_are_told(monkeypatch):
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 2000)
    found = statuses(run(Calls(), "json", [json_of(rows(1)), json_of(np.ones((300, 2))), json_of(rows(3))]))
    assert found == [200, 413, 200]
