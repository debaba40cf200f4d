"""The gRPC checks of fettle.testing.oip: a server that keeps the rules passes; one that breaks one fails its check."""

import contextlib
import importlib.util
from pathlib import Path

import pytest

from fettle.testing import oip
from fettle.testing.oip import rpc
from fettle.testing.oip.run import main

pytest.importorskip("grpc")
pytest.importorskip("tritonclient.grpc")
HERE = Path(__file__).parent


def _beside(name):
    """A module of this folder: there is no package here to import it from."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rest_half, FakeGrpc = _beside("fake_oip"), _beside("fake_oip_grpc").FakeGrpc


@contextlib.contextmanager
def faked(model="pair", fault="", token=None):
    """Both halves; only the gRPC one has the fault."""
    parts = rest_half.MODELS[model]
    with (
        contextlib.closing(rest_half.Fake(model)) as rest,
        contextlib.closing(FakeGrpc(model, *parts, rest_half.DTYPES, fault=fault)) as grpc,
    ):
        rest.token = grpc.token = token
        yield oip.Server(rest.url, model=model, timeout_s=20, grpc=grpc.address, token=token or "")


@pytest.mark.parametrize("model", ["pair", "single", "text", "fixed", "wide"])
def test_a_faultless_server_passes(model):
    with faked(model) as server:
        outcomes = {check.__name__: oip.try_check(check, server) for check in rpc.CHECKS}
    assert {outcome for outcome, _ in outcomes.values()} == {"pass"}, outcomes


FAULTS = {
    "never ready": rpc.says_over_grpc_that_it_is_live_and_ready,
    "no version": rpc.describes_itself_over_grpc,
    "free dimensions are one": rpc.describes_the_model_over_grpc_as_over_rest,
    "big endian": rpc.answers_raw_tensors_as_rest_does,
    "forgets a raw output": rpc.answers_raw_tensors_as_rest_does,
    "answers are no messages": rpc.answers_raw_tensors_as_rest_does,
    "typed tensors upside down": rpc.answers_typed_tensors_as_rest_does,
    "no id": rpc.echoes_the_id_over_grpc,
    "ignores outputs": rpc.returns_only_the_outputs_asked_for_over_grpc,
    "any model": rpc.refuses_unknown_models_over_grpc,
    "any model is ready": rpc.refuses_unknown_models_over_grpc,
    "unknown codes": rpc.refuses_unknown_models_over_grpc,
    "cuts or fills raw tensors": rpc.refuses_raw_tensors_of_a_wrong_size,
    "raw goes before typed": rpc.refuses_raw_and_typed_tensors_at_once,
    "fills up typed values": rpc.refuses_a_wrong_number_of_typed_values,
    "takes any datatype": rpc.refuses_a_wrong_datatype_over_grpc,
    "zeros for missing inputs": rpc.refuses_missing_inputs_over_grpc,
    "ignores unknown outputs": rpc.refuses_an_unknown_output_over_grpc,
    "answers damage": rpc.refuses_what_is_no_message,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_the_check_that_is_meant_for_it(fault):
    with faked(fault=fault) as server:
        outcome, message = oip.try_check(FAULTS[fault], server)
    assert outcome == "FAIL", message
    assert "got " in message
    assert "could not be judged" not in message


def test_every_check_has_been_seen_to_fail():
    assert set(FAULTS.values()) == set(rpc.CHECKS)


def test_without_the_address_its_checks_are_skipped():
    with faked() as server:
        without = oip.Server(server.url, model="pair")
        found = [oip.try_check(check, without) for check in rpc.CHECKS]
    assert {outcome for outcome, _ in found} == {"skipped"}
    assert "--grpc HOST:PORT" in found[0][1]


def test_the_token_goes_with_every_call():
    with faked(token="secret") as server:
        assert oip.try_check(rpc.answers_raw_tensors_as_rest_does, server) == ("pass", "")
        wrong = oip.Server(server.url, model="pair", grpc=server.grpc, token="wrong")
        assert oip.try_check(rpc.describes_itself_over_grpc, wrong)[0] == "FAIL"


def test_the_command_takes_the_address(capsys):
    with faked() as server:
        skipped = [part for group in oip.GROUPS if group != "grpc" for part in ("--skip", group)]
        assert main([server.url, "--model", "pair", "--grpc", server.grpc, *skipped]) == 0
        assert "pass    grpc.answers_raw_tensors_as_rest_does" in capsys.readouterr().out.splitlines()
        assert main([server.url, "--model", "pair", "--grpc", "127.0.0.1:1", *skipped]) == 1
