"""The session of GPUs, on a CPU: bit for bit what `session.run` gives, in memory that is each answer's own."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from fettle.core.signature import DTYPES, Signature, TensorSpec
from fettle.runtime import onnxruntime as module
from fettle.runtime._onnx_bound import Bound
from fettle.runtime._pinned import CudaHost, PinnedMemory
from fettle.runtime.onnxruntime import OnnxRuntime
from fettle.testing import runtimes
from fettle.testing.runtimes import seal


def value(name, dtype, shape):
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def session_of(nodes, inputs, outputs, **more):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, **more)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bound(session, cuda, **options):
    """The session, bound to that CUDA's memory; specs as its graph has them."""

    def specs(items):
        names = {"tensor(float)": "float32", "tensor(double)": "float64"}
        return tuple(
            TensorSpec(
                name=item.name, dtype=names.get(item.type, item.type[7:-1]), shape=tuple(map(_named, item.shape))
            )
            for item in items
        )

    signature = Signature(inputs=specs(session.get_inputs()), outputs=specs(session.get_outputs()))
    return Bound(session, signature, PinnedMemory(CudaHost(cuda, 0), **options))


def _named(size):
    return "free" if size is None else size


def same(found, session, inputs):
    names = [item.name for item in session.get_outputs()]
    want = dict(zip(names, session.run(names, dict(inputs)), strict=True))
    assert list(found) == names
    for name, array in want.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name


def copies(dtype):
    """The input itself, twice; and transposed, with a constant beside."""
    return session_of(
        [
            helper.make_node("Identity", ["x"], ["same"]),
            helper.make_node("Transpose", ["x"], ["turned"], perm=[2, 0, 1]),
        ],
        [value("x", dtype, ["b", "n", 3])],
        [value("same", dtype, ["b", "n", 3]), value("turned", dtype, [3, "b", "n"]), value("constant", dtype, [2])],
        initializer=[onnx.numpy_helper.from_array(np.array([0, 1], dtype), "constant")],
    )


def joins():
    """Two inputs of one batch and a scalar: one output of a size known from the inputs, one of a sum of theirs."""
    return session_of(
        [
            helper.make_node("Add", ["x", "s"], ["y"]),
            helper.make_node("Concat", ["x", "z"], ["w"], axis=0),
            helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        ],
        [value("x", "float32", ["b", 4]), value("z", "float32", ["b", 4]), value("s", "float32", [])],
        [value("y", "float32", ["b", 4]), value("w", "float32", ["rows", 4]), value("total", "float32", [])],
    )


def finds():
    """The places of what is not zero: as many columns as the data says."""
    return session_of(
        [helper.make_node("NonZero", ["x"], ["places"]), helper.make_node("Neg", ["x"], ["y"])],
        [value("x", "float32", ["b", 3])],
        [value("places", "int64", [2, "count"]), value("y", "float32", ["b", 3])],
    )


def passes():
    """An output that is an input: ONNX Runtime gives the input's memory, and leaves alone what was bound."""
    return session_of(
        [helper.make_node("Relu", ["y"], ["w"])],
        [value("x", "float32", ["b", 3]), value("y", "float32", ["b", 3])],
        [value("x", "float32", ["b", 3]), value("w", "float32", ["b", 3])],
    )


_sessions = {}


def _session(make, *arguments):
    key = make, arguments
    if key not in _sessions:
        _sessions[key] = make(*arguments)
    return _sessions[key]


SIZES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=4)


@pytest.mark.parametrize("dtype", DTYPES)
@given(sizes=SIZES, seed=st.integers(0, 2**32))
def test_every_type_comes_back_bit_for_bit(dtype, sizes, seed, fake_cuda):
    """NaN with all of its bits, infinities, subnormals and -0 included."""
    session = _session(copies, dtype)
    runner = bound(session, fake_cuda())
    generator = np.random.default_rng(seed)
    for rows, columns in sizes:
        raw = generator.integers(0, 2 if dtype == "bool" else 256, rows * columns * 3 * 8, np.uint8)
        inputs = {"x": raw.view(dtype)[: rows * columns * 3].reshape(rows, columns, 3)}
        same(runner.run(inputs), session, inputs)


@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5), layout=st.sampled_from(["C", "F", "every", "back"]))
def test_batches_of_any_size_and_layout_are_answered_as_plainly(sizes, layout, fake_cuda):
    session = _session(joins)
    runner = bound(session, fake_cuda())
    for rows in sizes:
        generator = np.random.default_rng(rows)
        x = generator.normal(size=(rows, 4)).astype(np.float32)
        views = {"C": x, "F": np.asfortranarray(x), "every": np.repeat(x, 2, axis=0)[::2], "back": x[::-1]}
        inputs = {"x": views[layout], "z": views[layout][:, ::-1], "s": np.array(rows, np.float32)}
        same(runner.run(inputs), session, inputs)


@given(rows=st.lists(st.integers(0, 20), min_size=1, max_size=5), part=st.floats(0, 1))
def test_shapes_that_follow_from_the_data_are_left_to_the_engine(rows, part, fake_cuda):
    session = _session(finds)
    runner = bound(session, fake_cuda())
    for count in rows:
        generator = np.random.default_rng(count)
        x = (generator.random((count, 3)) < part).astype(np.float32)
        same(runner.run({"x": x}), session, {"x": x})
    assert runner._binds


def test_an_output_that_is_an_input_is_given_and_is_a_copy(fake_cuda):
    session = _session(passes)
    runner = bound(session, fake_cuda())
    inputs = {"x": runner.empty("x", (2, 3)), "y": np.ones((2, 3), np.float32)}
    inputs["x"][...] = 5
    found = runner.run(inputs)
    same(found, session, inputs)
    inputs["x"][...] = 6
    assert (found["x"] == 5).all()


def test_known_outputs_and_inputs_from_empty_lie_in_page_locked_memory_and_are_not_copied(fake_cuda):
    cuda = fake_cuda()
    session = _session(joins)
    runner = bound(session, cuda)
    x = runner.empty("x", (8, 4))
    x[...] = 1
    # z has a part of one array as its input, s has none of ours.
    inputs = {"x": x[2:5], "z": x[5:], "s": np.zeros((), np.float32)}
    before = len(cuda.blocks)
    found = runner.run(inputs)
    same(found, session, inputs)
    assert {name: cuda.holds(array) for name, array in found.items()} == {"y": True, "w": False, "total": True}
    assert before == 1
    assert len(cuda.blocks) == 4  # x, s, y, total


def test_answers_stay_as_they_are_while_others_are_computed(fake_cuda):
    session = _session(joins)
    runner = bound(session, fake_cuda())
    batches = [
        {"x": np.full((rows, 4), rows, np.float32), "z": np.zeros((rows, 4), np.float32), "s": np.zeros((), np.float32)}
        for rows in (5, 1, 9, 5, 3, 5) * 5
    ]
    answers = [runner.run(batch) for batch in batches]
    for batch, found in zip(batches, answers, strict=True):
        same(found, session, batch)
    addresses = [array.__array_interface__["data"][0] for found in answers for array in found.values()]
    assert len(set(addresses)) == len(addresses)


def test_several_threads_at_once_get_what_one_gets(fake_cuda):
    session = _session(joins)
    runner = bound(session, fake_cuda())
    batches = [
        {
            name: np.random.default_rng([rows, place]).normal(size=shape).astype(np.float32)
            for place, (name, shape) in enumerate({"x": (rows, 4), "z": (rows, 4), "s": ()}.items())
        }
        for rows in range(1, 60)
    ]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(runner.run, batches * 4))
    for batch, found in zip(batches * 4, answers, strict=True):
        same(found, session, batch)


def test_what_one_thread_warmed_another_uses(fake_cuda):
    """A server loads and warms a model on a thread of its own."""
    cuda = fake_cuda()
    runner = bound(_session(joins), cuda)
    inputs = {"x": np.ones((20, 4), np.float32), "z": np.ones((20, 4), np.float32), "s": np.zeros((), np.float32)}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(runner.run, inputs).result()
    before = len(cuda.flags)
    runner.run(inputs)
    assert len(cuda.flags) == before > 0


def test_memory_does_not_grow_with_the_number_of_runs(fake_cuda):
    cuda = fake_cuda()
    runner = bound(_session(joins), cuda)
    sizes = np.random.default_rng(0).integers(1, 5000, 1000)
    for rows in sizes:
        x = runner.empty("x", (int(rows), 4))
        x[...] = 0
        runner.run({"x": x, "z": x, "s": np.zeros((), np.float32)})
    # At most two of each power of two: x and y; s and total are of the smallest.
    assert len(cuda.blocks) <= 2 * len({len(block) for block in cuda.blocks.values()}) + 2
    assert sum(map(len, cuda.blocks.values())) < 2 * 2 * 2 * 5000 * 4 * 4


def test_a_limit_changes_no_answer(fake_cuda):
    session = _session(joins)
    runner = bound(session, fake_cuda(), limit_bytes=4096)
    for rows in (1, 2000, 3, 0, 500):
        x = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
        inputs = {"x": x, "z": x, "s": np.ones((), np.float32)}
        same(runner.run(inputs), session, inputs)


@pytest.mark.parametrize("shape", [["b", 2], ["b", 3], [3, "b"], [1, "b"]])
def test_a_graph_that_lies_about_a_shape_is_answered_plainly_and_told(shape, caplog, fake_cuda):
    """A shape that is only declared: how much is repeated is an input, so nothing infers it."""
    session = session_of(
        [helper.make_node("Tile", ["x", "times"], ["y"])],
        [value("x", "float32", ["b", 1]), value("times", "int64", [2])],
        [value("y", "float32", shape)],
    )
    runner = bound(session, fake_cuda())
    x = np.arange(6, dtype=np.float32).reshape(6, 1)
    with caplog.at_level(logging.WARNING, "fettle.runtime"):
        for times in ([1, 1], [1, 4], [2, 5], [1, 2]):
            inputs = {"x": x, "times": np.array(times, np.int64)}
            same(runner.run(inputs), session, inputs)
    assert len([record for record in caplog.records if "runs without that from now on" in record.message]) == 1


def test_what_fails_plainly_fails_with_the_same_error_and_changes_nothing(fake_cuda):
    session = _session(joins)
    runner = bound(session, fake_cuda())
    good = {"x": np.ones((2, 4), np.float32), "z": np.ones((2, 4), np.float32), "s": np.zeros((), np.float32)}
    for bad in ({**good, "x": np.ones((2, 5), np.float32)}, {**good, "x": np.ones((2, 4))}, {"x": good["x"]}):
        with pytest.raises(Exception) as plain:  # noqa: PT011
            session.run(None, dict(bad))
        with pytest.raises(type(plain.value)) as caught:
            runner.run(bad)
        assert str(caught.value) == str(plain.value)
    assert runner._binds
    same(runner.run(good), session, good)


def test_a_session_that_cannot_bind_at_all_is_answered_plainly(caplog, fake_cuda):
    session = _session(joins)

    class Refusing:
        def __getattr__(self, name):
            return getattr(session, name)

        def io_binding(self):
            raise RuntimeError

    runner = bound(Refusing(), fake_cuda())
    inputs = {"x": np.ones((2, 4), np.float32), "z": np.ones((2, 4), np.float32), "s": np.zeros((), np.float32)}
    with caplog.at_level(logging.WARNING, "fettle.runtime"):
        same(runner.run(inputs), session, inputs)
        same(runner.run(inputs), session, inputs)
    assert len(caplog.records) == 1


class Recording:
    """A session's binding that notes the order of its calls."""

    def __init__(self, binding, calls):
        self._binding, self._calls = binding, calls

    def __getattr__(self, name):
        self._calls.append(name)
        return getattr(self._binding, name)


def test_the_device_is_waited_for_after_binding_and_after_a_run_that_fails(fake_cuda):
    """What a CPU cannot show: page-locked memory is copied from while the call that asked for it has returned."""
    session, calls = _session(joins), []

    class Watched:
        def __getattr__(self, name):
            return getattr(session, name)

        def io_binding(self):
            return Recording(session.io_binding(), calls)

        def run_with_iobinding(self, binding):
            calls.append("run")
            session.run_with_iobinding(binding._binding)

    inputs = {"x": np.ones((2, 4), np.float32), "z": np.ones((2, 4), np.float32), "s": np.zeros((), np.float32)}
    runner = bound(Watched(), fake_cuda())
    runner.run(inputs)
    order = [*["bind_cpu_input"] * 3, *["bind_output"] * 3, "synchronize_inputs", "run", "synchronize_outputs"]
    assert calls == [*order, "get_outputs"]
    calls.clear()
    with pytest.raises(Exception, match="x"):
        runner.run({**inputs, "x": np.ones((2, 5), np.float32)})
    assert calls == order


class OnCpu(OnnxRuntime):
    """The runtime as it is on a GPU, but for the provider."""

    def __init__(self, memory):
        self._memory = memory

    def load(self, artifact, *, threads):
        plain = super().load(artifact, threads=threads)
        return Bound(plain._session, plain.signature, self._memory)


# Of the kit, what asks for answers; what export writes is the same.
@pytest.mark.parametrize(
    "check",
    [runtimes.agrees_with_torch, runtimes.answers_several_threads, runtimes.takes_views],
    ids=lambda check: check.__name__,
)
def test_it_keeps_what_every_runtime_must(check, tmp_path, fake_cuda, monkeypatch):
    # The others take and give one tensor as well, and export for seconds each.
    monkeypatch.setattr(runtimes, "_MODELS", ("two_inputs", "two_outputs"))
    cuda = fake_cuda()
    check(OnCpu(PinnedMemory(CudaHost(cuda, 0))), tmp_path)
    assert cuda.flags, "nothing was page-locked"


def test_on_a_gpu_the_runtime_loads_it_with_options_for_serving(onnx_mlp, monkeypatch, fake_cuda):
    seen, loaded = {}, []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            seen["providers"] = providers
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    memory = PinnedMemory(CudaHost(fake_cuda(), 1))
    monkeypatch.setenv("FETTLE_DEVICE", "cuda:1")
    monkeypatch.setattr(module.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(module.onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(module.onnxruntime, "preload_dlls", lambda: loaded.append("before the session"))
    monkeypatch.setattr(module, "pinned_memory", lambda device: seen.update(device=device) or memory)
    runner = OnnxRuntime().load(seal(*onnx_mlp), threads=1)
    assert isinstance(runner, Bound)
    assert loaded
    assert seen["device"] == 1
    (name, options), fallback = seen["providers"]
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {
        "device_id": 1,
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
    }


def test_on_a_cpu_the_session_is_run_plainly(onnx_mlp, monkeypatch):
    monkeypatch.delenv("FETTLE_DEVICE", raising=False)
    runner = OnnxRuntime().load(seal(*onnx_mlp), threads=1)
    assert not isinstance(runner, Bound)
    assert runner.empty("input_9", (3, 12)).dtype == np.float32
