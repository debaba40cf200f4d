"""A worker on a thread of this process, told by hand what the server would tell it."""

import gc
import json
import re
import socket
import threading
import weakref

import msgspec
import numpy as np
import pytest

from fettle.serve import wire
from fettle.serve import worker as worker_module
from fettle.serve.worker import Worker


class Hand:
    """The server's end of the socket."""

    def __init__(self):
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(20)
        self.worker = Worker(self.theirs)
        self.problem = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._frames = wire.Frames()
        self._reports = []

    def _run(self):
        try:
            self.worker.run()
        except Exception as problem:
            self.problem = problem

    def tell(self, order, *payloads):
        body = b"".join(payloads)
        self.ours.sendall(wire.frame(order, len(body)) + body)

    def hear(self):
        """The next report and its body."""
        while not self._reports:
            data = self.ours.recv(2**16)
            assert data, "the worker hung up"
            self._reports += [(wire.report_of(header), bytes(body)) for header, body in self._frames.feed(data)]
        return self._reports.pop(0)

    def load(self, root, key=1, *, max_batch_rows=4):
        self.tell(wire.Load(key, "tiny", key, str(root), 1, max_batch_rows))

    def work(self, payloads, *, key=1, number=1, kind="image"):
        items = [wire.Item(f"r{index}", len(payload)) for index, payload in enumerate(payloads)]
        self.tell(wire.Work(number, key, kind, items, False, 1_000_000, 100), *payloads)

    def answers(self, number=1):
        """(status, content) of each item of the work that is reported next."""
        report, body = self.hear()
        assert isinstance(report, wire.Done)
        assert report.id == number
        found, start = [], 0
        for outcome in report.outcomes:
            found.append((outcome.status, body[start : start + outcome.size]))
            start += outcome.size
        assert start == len(body)
        return found

    def ended(self):
        self.thread.join(20)
        assert not self.thread.is_alive()

    def hang_up(self):
        self.ours.shutdown(socket.SHUT_WR)
        self.ended()
        for thread in threading.enumerate():
            if thread.name == "fettle-load":
                thread.join(20)
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def hand():
    hand = Hand()
    yield hand
    hand.hang_up()
    assert hand.problem is None


def forgotten(reference):
    gc.collect()
    return reference() is None


def index_of(answer):
    status, content = answer
    assert status == 200, content
    return json.loads(content)["index"]


def spoiled(golden):
    golden["output:logits"] = golden["output:logits"] + 0.01


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
FAILED = (500, b"the server failed on this request")


def test_a_good_artifact_is_loaded_and_its_warm_up_told(hand, shelf_root):
    hand.load(shelf_root / "1", max_batch_rows=6)
    report, body = hand.hear()
    assert isinstance(report, wire.Loaded)
    assert (report.key, report.rows, body) == (1, [1, 2, 4, 6], b"")
    assert len(report.seconds) == 4
    assert min(report.seconds) > 0


def test_images_are_answered_in_order(hand, shelf_root, kit):
    hand.load(shelf_root / "1")
    hand.hear()
    hand.work([kit.picture(COLORS[index]) for index in (2, 0, 1)], number=5)
    hand.work([kit.picture(COLORS[1])], number=6)
    assert [index_of(answer) for answer in hand.answers(5)] == [2, 0, 1]
    assert [index_of(answer) for answer in hand.answers(6)] == [1]


@pytest.mark.parametrize("how", ["golden", "no folder", "damaged", "no model"])
def test_a_bad_artifact_is_refused_with_a_reason_without_paths(hand, kit, tmp_path, how):
    root = tmp_path / "a"
    if how != "no folder":
        kit.image_artifact(root, spoil=spoiled if how == "golden" else None)
    if how == "damaged":
        (root / "model.onnx").write_bytes(b"\x00" + (root / "model.onnx").read_bytes()[1:])
    if how == "no model":
        (root / "model.onnx").unlink()
    hand.load(root, 7)
    report, _ = hand.hear()
    assert isinstance(report, wire.Refused)
    assert report.key == 7
    assert report.reason
    assert not re.search(r"Traceback|/work|/tmp|\.py|site-packages", report.reason)
    assert str(tmp_path) not in report.reason
    assert "Traceback" in report.detail
    if how == "golden":
        assert "golden output 'logits' differs by 0.01" in report.reason


def test_after_a_refusal_what_was_there_goes_on(hand, kit, shelf_root, tmp_path):
    hand.load(shelf_root / "1", 1)
    hand.hear()
    kit.image_artifact(tmp_path / "bad", spoil=spoiled)
    hand.load(tmp_path / "bad", 2)
    assert isinstance(hand.hear()[0], wire.Refused)
    hand.work([kit.picture()], key=1)
    assert index_of(hand.answers()[0]) == 0
    hand.work([kit.picture()], key=2, number=2)
    assert hand.answers(2) == [FAILED]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_work_for_a_model_that_is_not_there_is_500_for_each(hand, count, caplog):
    hand.work([b"x"] * count)
    assert hand.answers() == [FAILED] * count
    assert "outside of the model" in caplog.text


def test_work_is_answered_while_another_version_loads(hand, shelf_root, kit, monkeypatch):
    gate, entered = threading.Event(), threading.Event()
    load_model = worker_module.load_model

    def slowly(name, version, *given, **options):
        if version == 2:
            entered.set()
            assert gate.wait(20)
        return load_model(name, version, *given, **options)

    monkeypatch.setattr(worker_module, "load_model", slowly)
    hand.load(shelf_root / "1", 1)
    hand.hear()
    hand.load(shelf_root / "2", 2)
    assert entered.wait(20)
    hand.work([kit.picture(COLORS[1])], key=1)
    assert index_of(hand.answers()[0]) == 1
    gate.set()
    assert hand.hear()[0].key == 2
    hand.work([kit.picture(COLORS[0])], key=2, number=2)
    assert index_of(hand.answers(2)[0]) == 0


def test_versions_answer_side_by_side(hand, shelf_root, kit):
    for key in (1, 2):
        hand.load(shelf_root / str(key), key)
        hand.hear()
    found = []
    for key in (1, 2):
        hand.work([kit.picture((128, 128, 128))], key=key)
        found.append(json.loads(hand.answers()[0][1]))
    assert [answer["version"] for answer in found] == [1, 2]
    assert found[0]["probabilities"] != found[1]["probabilities"]


def test_unload_frees_the_model(hand, shelf_root, kit):
    hand.load(shelf_root / "1")
    hand.hear()
    reference = weakref.ref(hand.worker._models[1][0].runner)
    hand.work([kit.picture()])
    hand.answers()
    assert reference() is not None
    hand.tell(wire.Unload(1))
    hand.work([kit.picture()], number=2)
    assert hand.answers(2) == [FAILED]
    kit.until(lambda: forgotten(reference))


def test_after_an_unload_its_memory_goes_back_to_the_system(hand, shelf_root, monkeypatch):
    held = []
    monkeypatch.setattr(worker_module, "give_back", lambda: held.append(set(hand.worker._models)))
    for key in (1, 2):
        hand.load(shelf_root / str(key), key)
        hand.hear()
    hand.tell(wire.Unload(1))
    hand.work([], key=2)
    hand.answers()
    for thread in threading.enumerate():
        if thread.name == "fettle-give-back":
            thread.join(20)
    assert held == [{2}]


def test_giving_memory_back_takes_nothing_that_is_in_use():
    array = np.arange(2**20)
    worker_module.give_back()
    assert array[-1] == 2**20 - 1


def test_unload_of_what_is_not_there_changes_nothing(hand, shelf_root):
    hand.tell(wire.Unload(9))
    hand.load(shelf_root / "1")
    assert isinstance(hand.hear()[0], wire.Loaded)


def test_unload_of_what_still_loads_frees_it_too(hand, shelf_root, kit, monkeypatch):
    gate, loads = threading.Event(), []
    load_model = worker_module.load_model

    def slowly(*given, **options):
        assert gate.wait(20)
        model, times = load_model(*given, **options)
        loads.append(weakref.ref(model.runner))
        return model, times

    monkeypatch.setattr(worker_module, "load_model", slowly)
    hand.load(shelf_root / "1")
    hand.tell(wire.Unload(1))
    hand.work([], key=2)  # the answer tells that the order before it was obeyed
    hand.answers()
    gate.set()
    kit.until(lambda: not any(thread.name == "fettle-load" for thread in threading.enumerate()))
    (reference,) = loads
    assert forgotten(reference)


def test_an_item_that_cannot_be_read_fails_alone(hand, kit, tmp_path):
    kit.echo_artifact(tmp_path / "echo")
    hand.load(tmp_path / "echo")
    hand.hear()
    names = {"b": "BOOL", "u8": "UINT8", "u64": "UINT64", "i8": "INT8", "i64": "INT64"}
    names |= {"f16": "FP16", "f32": "FP32", "f64": "FP64", "wide": "FP32"}

    def body(number):
        tensors = []
        for name, datatype in names.items():
            shape = [1, 2, 3] if name == "wide" else [1, 2]
            values = [True if datatype == "BOOL" else number] * int(np.prod(shape))
            tensors.append({"name": name, "shape": shape, "datatype": datatype, "data": values})
        return msgspec.json.encode({"inputs": tensors})

    hand.work([body(1), b"{", body(2)], kind="json")
    first, bad, last = hand.answers()
    assert [first[0], bad[0], last[0]] == [200, 400, 200]
    outputs = {one["name"]: one["data"] for one in json.loads(last[1])["outputs"]}
    assert outputs["out_f64"] == [2, 2]
    assert outputs["out_wide"] == [2] * 6


@pytest.mark.parametrize("cut", [0, 3, 11])
def test_the_end_of_the_stream_ends_the_worker(hand, cut):
    """At once, and even in the middle of an order."""
    hand.ours.sendall(wire.frame(wire.Unload(1), 5)[:cut])
    hand.ours.shutdown(socket.SHUT_WR)
    hand.ended()


def test_orders_that_came_before_the_end_are_obeyed(hand):
    hand.work([b"x"])
    hand.ours.shutdown(socket.SHUT_WR)
    assert hand.answers() == [FAILED]
    hand.ended()


def test_what_is_no_order_ends_the_worker():
    """Nobody knows what comes after it: the server starts another."""
    hand = Hand()
    hand.ours.sendall(b"\x02\x00\x00\x00\x00\x00\x00\x00hi")
    hand.ended()
    assert isinstance(hand.problem, msgspec.MsgspecError)
    hand.hang_up()
