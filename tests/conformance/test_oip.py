"""A server that keeps the Open Inference Protocol passes fettle.testing.oip; one that breaks a rule fails its check."""

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fettle.testing import oip
from fettle.testing.oip import binary, compression, infer, refusals, rest, rpc
from fettle.testing.oip.client import parse_json
from fettle.testing.oip.run import main
from fettle.testing.oip.tensors import (
    DATATYPES,
    Spec,
    array_from_bytes,
    array_from_json,
    differs,
    flat,
    nested,
    sample,
    to_bytes,
)

HERE = Path(__file__).parent


def _beside(name):
    """A module of this folder: there is no package here to import it from."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Fake = _beside("fake_oip").Fake


@contextlib.contextmanager
def faked(model="pair", fault="", **more):
    with contextlib.closing(Fake(model, fault, **more)) as fake:
        yield oip.Server(fake.url, model=model, timeout_s=20)


# A faultless server


# Its gRPC half has a fake and tests of its own: test_oip_grpc.py.
OVER_GRPC = {check.__name__ for check in rpc.CHECKS}
# What does not apply: none of the checks on every model.
SKIPPED = {
    "pair": {"takes_a_body_of_bytes_alone", "refuses_broken_strings"},
    "single": {
        "takes_inputs_in_any_order", "takes_binary_and_json_inputs_together", "refuses_broken_strings",
        "returns_outputs_in_the_order_asked",
    },
    "text": {"takes_a_body_of_bytes_alone", "takes_whole_numbers_for_floats", "refuses_nan_and_infinity"},
    "fixed": {
        "takes_whole_numbers_for_floats", "takes_inputs_in_any_order", "returns_outputs_in_the_order_asked",
        "answers_a_batch_row_by_row", "refuses_nan_and_infinity", "takes_binary_and_json_inputs_together",
        "refuses_broken_strings",
    },
    "wide": {
        "takes_inputs_in_any_order", "takes_binary_and_json_inputs_together", "takes_a_body_of_bytes_alone",
        "refuses_broken_strings", "returns_outputs_in_the_order_asked",
    },
}  # fmt: skip


@pytest.mark.parametrize("model", SKIPPED)
def test_a_faultless_server_passes(model):
    with faked(model) as server:
        results = list(oip.run_checks(server))
    assert [str(result) for result in results if result.outcome == "FAIL"] == []
    assert {result.name for result in results if result.outcome == "skipped"} - OVER_GRPC == SKIPPED[model]


def test_every_check_has_been_seen_to_pass():
    assert set.intersection(*SKIPPED.values()) == set()


def test_without_the_extension_its_checks_are_skipped():
    with faked(extensions=[]) as server:
        results = [result for result in oip.run_checks(server) if result.group == "binary"]
    assert {result.outcome for result in results} == {"skipped"}
    assert "binary_tensor_data" in results[0].message


def test_free_dimensions_take_the_size_that_is_given():
    with contextlib.closing(Fake("wide")) as fake:
        server = oip.Server(fake.url, model="wide", free=5)
        assert server.good(rows=2)["inputs"][0]["shape"] == [2, 5, 2]
        for check in (*infer.CHECKS, *binary.CHECKS):
            assert oip.try_check(check, server)[0] != "FAIL"


# One fault at a time

FAULTS = {
    "204 for live": rest.says_that_it_is_live,
    "not ready with 200": rest.says_that_it_is_ready,
    "no extensions": rest.describes_itself,
    "redirects the slash": rest.describes_itself_with_a_slash_too,
    "hangs on metadata": rest.describes_itself,
    "free dimensions are null": rest.describes_the_model,
    "versions are numbers": rest.describes_the_model,
    "no versions by path": rest.describes_each_version,
    "model not ready with 200": rest.says_that_the_model_is_ready,
    "no version is ready": rest.says_that_a_version_is_ready,
    "answers are text": rest.answers_with_the_type_of_json,
    "any model": rest.refuses_unknown_models,
    "any version": rest.refuses_unknown_versions,
    "HTML for unknown paths": rest.refuses_unknown_paths,
    "500 for wrong methods": rest.refuses_wrong_methods,
    "405 without Allow": rest.refuses_wrong_methods,
    "HEAD has a body": rest.answers_head_without_a_body,
    "closes without a word after errors": rest.keeps_the_order_of_a_connection,
    "leaves bodies unread": rest.keeps_the_order_of_a_connection,
    "chunks are no body": rest.takes_chunked_bodies_or_asks_for_a_length,
    "takes cut bodies": rest.survives_a_body_cut_short,
    "201 for answers": infer.answers_a_request,
    "null for a version": infer.leaves_out_what_it_has_not,
    "no model name": infer.answers_a_request,
    "numbers as texts": infer.answers_a_request,
    "a shape too many": infer.answers_a_request,
    "NaN in answers": infer.answers_a_request,
    "another version in answers": infer.answers_by_version,
    "forgets the second row": infer.answers_a_batch_row_by_row,
    "turns rows around": infer.answers_a_batch_row_by_row,
    "takes flat data only": infer.takes_flat_and_nested_data,
    "takes nested data only": infer.takes_flat_and_nested_data,
    "nested data upside down": infer.takes_flat_and_nested_data,
    "needs a point in floats": infer.takes_whole_numbers_for_floats,
    "inputs by position": infer.takes_inputs_in_any_order,
    "needs data last": infer.takes_fields_in_any_order,
    "no empty parameters": infer.takes_parameters_without_any,
    "no id": infer.echoes_the_id,
    "the first id for ever": infer.echoes_the_id,
    "ignores outputs": infer.returns_only_the_outputs_asked_for,
    "sorts outputs": infer.returns_outputs_in_the_order_asked,
    "adds noise": infer.answers_equal_requests_equally,
    "detail for error": refusals.refuses_an_unknown_output,
    "500 for bad requests": refusals.refuses_a_wrong_number_of_values,
    "casts": refusals.refuses_a_wrong_datatype,
    "takes any shape": refusals.refuses_a_wrong_shape,
    "fills up missing values": refusals.refuses_a_wrong_number_of_values,
    "zeros for missing inputs": refusals.refuses_a_missing_input,
    "the last of two inputs wins": refusals.refuses_an_input_given_twice,
    "ignores unknown outputs": refusals.refuses_an_unknown_output,
    "ids of any type": refusals.refuses_fields_of_a_wrong_type,
    "null is zero": refusals.refuses_values_that_are_none,
    "fails on odd values": refusals.answers_or_refuses_odd_values,
    "takes NaN": refusals.refuses_nan_and_infinity,
    "reads the first JSON text only": refusals.refuses_what_is_not_json,
    "an empty body is a good one": refusals.refuses_an_empty_body,
    "dies of depth": refusals.refuses_deep_nesting,
    "big endian": binary.takes_binary_inputs,
    "bytes for all inputs or none": binary.takes_binary_and_json_inputs_together,
    "no binary outputs": binary.gives_binary_outputs_by_request,
    "the request is stronger": binary.lets_an_output_override_the_request,
    "a wrong length of the JSON": binary.says_where_the_json_ends,
    "the length of the whole": binary.gives_binary_outputs_by_name,
    "no length of the JSON": binary.says_where_the_json_ends,
    "bytes are called JSON": binary.says_where_the_json_ends,
    "takes lengths beyond the body": binary.refuses_a_wrong_json_length,
    "500 for wrong lengths": binary.refuses_a_wrong_json_length,
    "fails on odd sizes": binary.refuses_a_wrong_binary_size,
    "finds the end of the JSON itself": binary.refuses_an_announced_size_without_the_header,
    "cuts or fills tensors": binary.refuses_bytes_that_do_not_fit_the_shape,
    "ignores leftover bytes": binary.refuses_leftover_bytes,
    "fills up missing bytes": binary.refuses_missing_bytes,
    "takes data and bytes": binary.refuses_data_and_bytes_at_once,
    "400 for compressed bodies": compression.takes_gzip_or_refuses_it,
    "deflate without a head": compression.takes_deflate_or_refuses_it,
    "takes no notice of codings": compression.takes_gzip_or_refuses_it,
    "no bytes in packed bodies": compression.takes_compressed_bytes,
    "takes unknown codings for plain": compression.refuses_unknown_codings,
    "takes cut streams": compression.refuses_broken_compression,
    "answers bombs": compression.refuses_a_bomb,
    "packs what must be plain": compression.answers_in_a_coding_that_was_asked_for,
    "raw deflate for gzip": compression.answers_in_a_coding_that_was_asked_for,
}  # fmt: skip
ON_OTHER_MODELS = {
    ("single", "no bodies of bytes"): binary.takes_a_body_of_bytes_alone,
    ("text", "cuts strings"): binary.refuses_broken_strings,
    ("single", "fills up missing values"): refusals.refuses_ragged_data,
    ("wide", "nested data upside down"): infer.takes_flat_and_nested_data,
}
EVERY = {("pair", fault): check for fault, check in FAULTS.items()} | ON_OTHER_MODELS


@pytest.mark.parametrize(("model", "fault"), EVERY, ids=[" ".join(case) for case in EVERY])
def test_each_fault_fails_the_check_that_is_meant_for_it(model, fault):
    check = EVERY[model, fault]
    with faked(model, fault) as server:
        if fault == "hangs on metadata":
            server = oip.Server(server.url, model=model, timeout_s=0.2)
        outcome, message = oip.try_check(check, server)
    assert outcome == "FAIL", message
    assert "got " in message
    assert "could not be judged" not in message


def test_every_check_has_been_seen_to_fail():
    assert set(EVERY.values()) == set(oip.CHECKS) - set(rpc.CHECKS)


def test_check_names_are_different():
    names = [check.__name__ for check in oip.CHECKS]
    assert len(set(names)) == len(names)
    assert not set(names) & set(oip.GROUPS)
    assert all(check.__doc__ for check in oip.CHECKS)


# A server that never ends


def test_a_server_that_drips_is_given_up():
    """Each byte comes well within the timeout, the whole never does."""
    closing = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))

    def drip():
        connected, _ = listening.accept()
        with connected, contextlib.suppress(OSError):
            connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not closing.wait(0.01):
                connected.sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    server = oip.Server(f"http://127.0.0.1:{listening.getsockname()[1]}", model="x", timeout_s=0.2)
    with pytest.raises(oip.Unanswered, match=r"within 0\.2 s"):
        server.get("/v2")
    closing.set()
    thread.join(10)
    listening.close()


def test_what_the_answer_leaves_out_is_a_failure_not_a_crash():
    """Metadata that is a list, a text or nothing fails each check with a sentence."""
    for metadata in ("[]", '"x"', "null", "7", "{}", '{"inputs": [7], "outputs": [7]}', '{"inputs": [{}]}'):
        with contextlib.closing(Fake()) as fake:
            fake.says = metadata.encode()
            server = oip.Server(fake.url, model="pair")
            results = list(oip.run_checks(server, skip=["compression", "binary"]))
        assert not [result for result in results if "could not be judged" in result.message]
        assert [result for result in results if result.outcome == "FAIL"]


# The command line


def test_lines_and_exit_codes(capsys):
    with faked() as server:
        assert main([server.url, "--model", "pair", "--skip", "compression", "--skip", "echoes_the_id"]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == len(oip.CHECKS)
    assert "pass    rest.says_that_it_is_live" in lines
    assert "skipped infer.echoes_the_id: left out by --skip" in lines
    counts = [sum(line.startswith(word) for line in lines) for word in ("pass", "FAIL", "skipped")]
    assert last == f"{counts[0]} passed, 0 failed, {counts[2]} skipped"
    with faked(fault="no id") as server:
        assert main([server.url, "--model", "pair", "--skip", "compression"]) == 1
        assert "FAIL    infer.echoes_the_id: the id must be returned as it was given, '42', got None" in (
            capsys.readouterr().out.splitlines()
        )


def test_json(capsys):
    with faked(fault="201 for answers") as server:
        assert main([server.url, "--model", "pair", "--json", "--skip", "compression"]) == 1
    document = json.loads(capsys.readouterr().out)
    found = {result["name"]: result for result in document["results"]}
    assert found["answers_a_request"]["outcome"] == "FAIL"
    assert document["failed"] == sum(result["outcome"] == "FAIL" for result in document["results"])
    assert list(found) == [check.__name__ for check in oip.CHECKS]


def test_the_model_is_found_where_the_server_lists_one(capsys):
    with contextlib.closing(Fake("single")) as fake:
        fake.index = [{"name": "single", "version": "1"}]
        assert main([fake.url, "--skip", "compression", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == "single"
        fake.index.append({"name": "other"})
        assert main([fake.url]) == 2
        assert "it lists other, single" in capsys.readouterr().err


def test_what_cannot_be_tried_is_2(capsys):
    with faked() as server:
        for arguments, word in (
            ([server.url], "name the model with --model"),
            ([server.url, "--model", "pair", "--skip", "nonsense"], "got nonsense"),
            (["http://127.0.0.1:1", "--model", "pair"], "must be answered"),
            (["nonsense", "--model", "pair"], "the URL must be"),
            (["http://127.0.0.1:99999", "--model", "pair"], "ort"),
        ):
            assert main(arguments) == 2
            assert word in capsys.readouterr().err
        for arguments in ([], [server.url, "--timeout", "0"], [server.url, "--free", "0"]):
            with pytest.raises(SystemExit) as end:
                main(arguments)
            assert end.value.code == 2


def test_the_token_goes_with_every_request():
    with contextlib.closing(Fake("pair")) as fake:
        fake.token = "secret"
        good, bad = (oip.Server(fake.url, model="pair", token=token) for token in ("secret", "wrong"))
        checks = (*rest.CHECKS, *infer.CHECKS)
        assert [oip.try_check(check, good)[1] for check in checks if oip.try_check(check, good)[0] == "FAIL"] == []
        assert oip.try_check(infer.answers_a_request, bad)[0] == "FAIL"


@pytest.mark.parametrize(("options", "code"), [([], 0), (["-O"], 2)], ids=["plain", "without assertions"])
def test_as_a_command(options, code):
    with faked() as server:
        command = [sys.executable, *options, "-m", "fettle.testing.oip", server.url, "--model", "pair"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr


# Tensors


@pytest.mark.parametrize("datatype", DATATYPES)
def test_tensors_go_through_json_and_bytes(datatype):
    spec = Spec("x", datatype, (-1, 3, -1))
    array = sample(spec, rows=2, free=2, seed=1)
    assert array.shape == (2, 3, 2)
    for data in (flat(array), nested(array), json.loads(json.dumps(nested(array)))):
        assert not differs(array_from_json(data, datatype, (2, 3, 2), where="x"), array, datatype)
    assert not differs(array_from_bytes(to_bytes(array), datatype, (2, 3, 2), where="x"), array, datatype)
    assert differs(array[::-1], array, datatype)
    assert "shapes" in differs(array[:1], array, datatype)


def test_values_differ_with_the_seed_and_the_name():
    one, other = Spec("x", "FP32", (4, 4)), Spec("y", "FP32", (4, 4))
    assert differs(sample(one), sample(other), "FP32")
    assert differs(sample(one), sample(one, seed=1), "FP32")
    assert not differs(sample(one), sample(one), "FP32")


@pytest.mark.parametrize(
    ("data", "datatype"),
    [
        ([1], "BOOL"), ([True], "INT8"), ([1.0], "INT8"), ([128], "INT8"), ([-1], "UINT8"), ([2**64], "UINT64"),
        (["1"], "FP32"), ([True], "FP32"), ([None], "FP32"), ([1], "BYTES"), ([1, 2], "FP32"),
        ("1", "FP32"), ({}, "FP32"),
    ],
)  # fmt: skip
def test_data_of_another_kind_is_refused(data, datatype):
    with pytest.raises(AssertionError, match=r"^x: "):
        array_from_json(data, datatype, (1,), where="x")


@pytest.mark.parametrize("text", [b"NaN", b"[Infinity]", b"", b"\xff", b"{} {}", b"[" * 100_000])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(AssertionError, match="it must be JSON"):
        parse_json(text, where="it")


# The server of this project


def artifact(root, nodes, inputs, outputs, constants=()):
    """One sealed ONNX file. inputs, outputs: name -> data type and shape."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    from fettle.core.artifact import Artifact, Manifest
    from fettle.core.recipe import Recipe
    from fettle.core.signature import Signature, TensorSpec

    root.mkdir(parents=True)
    values = [
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
            for name, (dtype, shape) in part.items()
        ]
        for part in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants]
    graph = helper.make_graph([helper.make_node(*node[:3], **dict(node[3:])) for node in nodes], "g", *values, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    (root / "model.onnx").write_bytes(model.SerializeToString())
    specs = [
        tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in part.items())
        for part in (inputs, outputs)
    ]
    signature = Signature(inputs=specs[0], outputs=specs[1])
    sizes = {"batch": 2, "n": 3}
    feed = {name: np.ones([sizes.get(size, size) for size in shape], dtype) for name, (dtype, shape) in inputs.items()}
    session = onnxruntime.InferenceSession((root / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    found = dict(zip(outputs, session.run(list(outputs), feed), strict=True))
    golden = {f"input:{name}": array for name, array in feed.items()}
    golden |= {f"output:{name}": array for name, array in found.items()}
    manifest = Manifest(
        runtime="onnxfile", precision="float", signature=signature, files=(), recipe=Recipe(name="test")
    )
    Artifact.seal(root, manifest, golden=golden)


def one_input(root):
    """A single input, which can be sent as bytes alone, and two outputs."""
    artifact(
        root,
        [("ReduceSum", ["x", "axes"], ["total"], ("keepdims", 0)), ("Mul", ["x", "two"], ["double"])],
        {"x": ("float32", ("batch", 4))},
        {"total": ("float32", ("batch",)), "double": ("float32", ("batch", 4))},
        [("axes", np.array([1], np.int64)), ("two", np.array(2, np.float32))],
    )


def many_inputs(root):
    """Most data types, an output for each, and a free dimension besides the batch."""
    dtypes = ("bool", "uint8", "uint64", "int8", "int64", "float16", "float32", "float64")
    inputs = {f"in_{dtype}": (dtype, ("batch", 2)) for dtype in dtypes} | {"wide": ("float32", ("batch", 2, "n"))}
    outputs = {f"out_{name}": spec for name, spec in inputs.items()}
    artifact(root, [("Identity", [name], [f"out_{name}"]) for name in inputs], inputs, outputs)


def fixed_batch(root):
    """No free dimension: nothing may be merged or split."""
    artifact(
        root,
        [("ReduceSum", ["x", "axes"], ["y"], ("keepdims", 0))],
        {"x": ("float32", (2, 3))},
        {"y": ("float32", (2,))},
        [("axes", np.array([1], np.int64))],
    )


@pytest.fixture(scope="module", params=[one_input, many_inputs, fixed_batch], ids=lambda build: build.__name__)
def fettle_server(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    request.param(root / "1")
    (root / "current").write_text("1")
    script = HERE.parent / "serve" / "run_server.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(root), json.dumps({"port": 0, "grpc_port": 0})],
        stdout=subprocess.PIPE,
        text=True,
    )
    watch = threading.Timer(60, process.kill)  # a server that never gets ready must not hold up the rest
    watch.start()
    with process:
        try:
            said = {}
            for word in ("grpc", "listening", "ready"):
                line = process.stdout.readline()
                assert line.startswith(word), line
                said[word] = line.split()[1]
            watch.cancel()
            yield oip.Server(said["ready"], model="tiny", timeout_s=20, grpc=said["grpc"])
        finally:
            watch.cancel()
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


@pytest.mark.parametrize("check", oip.CHECKS, ids=lambda check: check.__name__)
def test_the_server_of_fettle_conforms(check, fettle_server):
    try:
        check(fettle_server)
    except oip.Skipped as reason:
        pytest.skip(str(reason))
