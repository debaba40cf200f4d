"""Checks of inference with JSON data: what a good request may look like, and what must come back.

Sources: $inference_request and $inference_response of inference_rest.md, the same in open_inference_rest.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from fettle.testing.oip.answers import infer, same_outputs, same_values
from fettle.testing.oip.client import Skipped, short
from fettle.testing.oip.server import Server
from fettle.testing.oip.tensors import nested, request_of, with_input

_IDS = ("42", 'a "quoted" id ✓', "x" * 200)
_VERSIONS = 3


def answers_a_request(server: Server) -> None:
    """A request made from the metadata is answered with exactly 200 and every output, as the metadata says."""
    answer = infer(server, server.good())
    names = [spec.name for spec in server.outputs]
    assert sorted(answer.arrays) == sorted(names), (
        f"where no outputs are asked for, all must come: {', '.join(names)}, got {', '.join(answer.arrays)}"
    )


def leaves_out_what_it_has_not(server: Server) -> None:
    """`model_version` and `id` are texts and `parameters` objects, or they are not there: null is neither."""
    document = infer(server, server.good()).document
    for key in ("model_version", "id"):
        value = document.get(key, "")
        assert isinstance(value, str), f"{key} must be a text or be left out, got {short(value)}"
    for each in (document, *document["outputs"]):
        value = each.get("parameters", {})
        assert isinstance(value, dict), f"parameters must be an object or be left out, got {short(value)}"


def answers_by_version(server: Server) -> None:
    """A version that is ready answers by path, and names itself where the answer has a `model_version`."""
    ready = [v for v in server.versions[:_VERSIONS] if server.get(server.path("/ready", version=v)).status == 200]
    if not ready:
        raise Skipped("no version is ready, which is a check of its own")
    for version in ready:
        found = infer(server, server.good(), version=version).document.get("model_version", version)
        assert found == version, f"model_version must be that of the path, {version!r}, got {short(found)}"


def takes_flat_and_nested_data(server: Server) -> None:
    """`data` is in row-major order, flat or in lists as the shape says: both mean the same (tensor_data)."""
    if all(len(spec.shape) < 2 for spec in server.inputs):
        raise Skipped("no input has two dimensions")
    good = server.good(rows=2)
    deep = good
    for index, (spec, array) in enumerate(zip(server.inputs, server.arrays(rows=2).values(), strict=True)):
        deep = with_input(deep, index, data=nested(array)) if len(spec.shape) > 1 else deep
    same_outputs(server, infer(server, deep), infer(server, good), "nested data must be answered as flat data is")


def takes_whole_numbers_for_floats(server: Server) -> None:
    """JSON has one kind of number: 1 and 1.0 are the same, and JavaScript writes the first."""
    index = server.first_float()
    size = len(server.good()["inputs"][index]["data"])
    found, wanted = (infer(server, with_input(server.good(), index, data=[one] * size)) for one in (1, 1.0))
    same_outputs(server, found, wanted, "1 must be answered as 1.0 is")


def takes_inputs_in_any_order(server: Server) -> None:
    """Inputs have names; their order means nothing."""
    if len(server.inputs) < 2:
        raise Skipped("the model has one input")
    good = server.good()
    turned = {**good, "inputs": good["inputs"][::-1]}
    rule = "inputs in another order must be answered alike"
    same_outputs(server, infer(server, turned), infer(server, good), rule)


def takes_fields_in_any_order(server: Server) -> None:
    """A JSON object has no order (RFC 8259 4): `data` may come before `shape` and `datatype`, with space between."""
    good = server.good(id="1", parameters={})
    inputs = [dict(reversed(each.items())) for each in good["inputs"]]
    turned = {"inputs": inputs, "parameters": {}, "id": "1"}
    text = json.dumps(turned, indent=2).replace("\n", "\r\n\t").encode()
    rule = "fields in another order must be answered alike"
    same_outputs(server, infer(server, b" \n" + text + b"\n "), infer(server, good), rule)


def takes_parameters_without_any(server: Server) -> None:
    """`parameters` is an object of zero or more parameters, of the request, of inputs and of outputs."""
    good = server.good()
    request = {**good, "parameters": {}, "outputs": [{"name": spec.name, "parameters": {}} for spec in server.outputs]}
    for index in range(len(server.inputs)):
        request = with_input(request, index, parameters={})
    rule = "empty parameters must change nothing"
    same_outputs(server, infer(server, request), infer(server, good), rule)


def echoes_the_id(server: Server) -> None:
    """`id`: "if specified this identifier must be returned in the response" (inference_rest.md)."""
    for given in _IDS:
        found = infer(server, server.good(id=given)).document.get("id")
        assert found == given, f"the id must be returned as it was given, {short(given)}, got {short(found)}"


def returns_only_the_outputs_asked_for(server: Server) -> None:
    """`outputs` chooses: each alone comes alone, with the values that it has among all."""
    whole = infer(server, server.good())
    for spec in server.outputs:
        answer = infer(server, server.good(outputs=[{"name": spec.name}]))
        names = list(answer.arrays)
        assert names == [spec.name], f"only the output {spec.name} was asked for, got {', '.join(names) or 'none'}"
        assert spec.name in whole.arrays, f"output {spec.name} must come where no outputs are asked for, got none"
        rule = "an output asked for alone must be the same"
        same_values(server, spec.name, answer.arrays[spec.name], whole.arrays[spec.name], rule)


def returns_outputs_in_the_order_asked(server: Server) -> None:
    """In the order of `outputs`, either way round: no document says so, and clients that pair them off rely on it."""
    names = [spec.name for spec in server.outputs]
    if len(names) < 2:
        raise Skipped("the model has one output")
    for wanted in (names, names[::-1]):
        found = list(infer(server, server.good(outputs=[{"name": name} for name in wanted])).arrays)
        assert found == wanted, f"outputs must come in the order asked, {', '.join(wanted)}, got {', '.join(found)}"


def answers_equal_requests_equally(server: Server) -> None:
    """The same request gives the same values, whatever was asked in between."""
    first = infer(server, server.good())
    infer(server, server.good(seed=1))
    rule = "the same request must be answered alike"
    same_outputs(server, infer(server, server.good()), first, rule)


def answers_a_batch_row_by_row(server: Server) -> None:
    """The shape holds the whole batch: two rows in one request get, in this order, what each gets alone."""
    if not server.takes_rows:
        raise Skipped("not every input and output has a free first dimension")
    rows = [server.arrays(seed=seed) for seed in (0, 1)]
    together = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    both = infer(server, request_of(server.inputs, together))
    alone = [infer(server, request_of(server.inputs, row)) for row in rows]
    for name, array in both.arrays.items():
        assert len(array) == len(rows), f"two rows must get two answers, got {len(array)} in output {name}"
        for number, one in enumerate(alone):
            assert name in one.arrays, f"output {name} must come for one row as for two, got none"
            rule = f"row {number} of a batch must be answered as it is alone"
            same_values(server, name, array[number : number + 1], one.arrays[name], rule)


CHECKS: tuple[Callable[[Server], None], ...] = (
    answers_a_request,
    leaves_out_what_it_has_not,
    answers_by_version,
    takes_flat_and_nested_data,
    takes_whole_numbers_for_floats,
    takes_inputs_in_any_order,
    takes_fields_in_any_order,
    takes_parameters_without_any,
    echoes_the_id,
    returns_only_the_outputs_asked_for,
    returns_outputs_in_the_order_asked,
    answers_equal_requests_equally,
    answers_a_batch_row_by_row,
)
