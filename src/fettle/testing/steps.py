"""What every compression step must keep, as checks that raise AssertionError with a sentence.

from fettle.testing.steps import CHECKS

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_mine_conforms(check):
    check(MyStep())
"""

from __future__ import annotations

import copy
import functools
import json
import operator
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from fettle.compress.capture import as_deployed, capture, export_program
from fettle.compress.step import Context, Step, Tensors
from fettle.core import codec, plugins
from fettle.core.recipe import StepSpec
from fettle.runtime._onnx import write_onnx
from fettle.testing.models import CASES, LARGE, Case

_MODELS = ("residual", "two_inputs", "norm_first")


def context_for(case: Case, *, seed: int = 0, batches: int = 4) -> Context:
    """A context with calibration data that is a one-shot iterator, as a user's may be, and the model's own labels."""

    @functools.cache
    def labelled() -> list[tuple[Tensors, torch.Tensor]]:
        model, inputs = case.build(), [case.data(rows=32, seed=100 + batch) for batch in range(batches)]
        return [(batch, answers(model, batch)[0].argmax(dim=-1)) for batch in inputs]

    calibration: Iterator[Tensors] = (case.data(rows=32, seed=100 + batch) for batch in range(batches))
    return Context(example=case.data(rows=1), calibration=calibration, train=labelled, seed=seed)


def captured(case: Case) -> torch.fx.GraphModule:
    """A copy of the graph of the case's model, captured once in a process: for what does not depend on the capture."""
    return capture(_captured(case), case.data(rows=2))


@functools.cache
def _captured(case: Case) -> torch.fx.GraphModule:
    return capture(case.build(), case.data(rows=2))


def apply(step: Step, case: Case, model: torch.nn.Module) -> torch.nn.Module:
    """The step's result on this model of the case, in a context of its own."""
    return step.apply(model, context_for(case))


@functools.lru_cache(maxsize=8)  # as many as the models of one step's checks
def _applied(step: Step, case: Case) -> torch.nn.Module:
    """The step's result on the case's model, made once for the checks that only look at it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return apply(step, case, ready(step, case))


def ready(step: Step, case: Case) -> torch.nn.Module:
    """The case's model as the step takes it: after the step that must come before."""
    return copy.deepcopy(_after(step.follows, case.name)) if step.follows else case.build()


@functools.cache
def _after(step: str, case: str) -> torch.nn.Module:
    package, _, name = step.rpartition(".")
    found = {each.name: each for each in (*CASES.values(), *LARGE.values())}[case]
    return apply(plugins.load(f"fettle.compress.{package}", name, Step)(), found, found.build())


def leaves_its_input_untouched(step: Step) -> None:
    """Parameters, buffers, training flags, modules and hooks of the given model are as before; so are its answers."""
    for case in _chosen():
        model = ready(step, case)
        next(iter(model.children())).train()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        flags = {name: module.training for name, module in model.named_modules()}
        gradients = [parameter.requires_grad for parameter in model.parameters()]
        apply(step, case, model)
        after = model.state_dict()
        assert list(after) == list(state), f"{case.name}: names in the state must stay as they were"
        for name, value in state.items():
            assert torch.equal(after[name], value), f"{case.name}: {name} of the input model must stay as it was"
        now = {name: module.training for name, module in model.named_modules()}
        assert now == flags, f"{case.name}: training flags must stay as they were, got {now}"
        assert [p.requires_grad for p in model.parameters()] == gradients, f"{case.name}: requires_grad must stay"


def leaves_global_state_untouched(step: Step) -> None:
    """Random generators, gradient mode and thread count belong to the caller."""
    case = CASES["shared_relu"]
    model = ready(step, case)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    modes = torch.is_grad_enabled(), torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    apply(step, case, model)
    assert torch.equal(torch.get_rng_state(), torch_state), "the generator of torch must be left alone"
    assert str(np.random.get_state()) == str(numpy_state), "the generator of numpy must be left alone"
    assert random.getstate() == python_state, "the generator of Python must be left alone"
    now = torch.is_grad_enabled(), torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    assert now == modes, f"gradient mode, threads and fast path must be left at {modes}, got {now}"


def repeats_itself(step: Step) -> None:
    """The same model, data and seed give the same program, byte for byte, whatever the state of global generators."""
    for case in _chosen():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)  # another than that of the first
            again = apply(step, case, ready(step, case))
        first, second = (_content_of(each, case) for each in (_applied(step, case), again))
        for part, value in first.items():
            assert second.get(part) == value, f"{case.name}: the same work must give the same file, not other {part}"
        assert list(second) == list(first), f"{case.name}: the same work must give the same file, with no more tensors"


def round_trips_through_json(step: Step) -> None:
    """Its parameters are all there is to it."""
    spec = step.spec()
    whole = codec.from_json(StepSpec, json.loads(json.dumps(codec.to_json(spec))), where="the round trip")
    again = type(step).from_spec(whole)
    assert again == step, f"JSON must hold every parameter: {step} became {again}"
    assert codec.digest(again.spec()) == codec.digest(spec), "the digest must survive the round trip"


def shrinks(step: Step) -> None:
    """Its file is smaller by a tenth or more for the kinds of layer it names: fewer bytes, where masks save none."""
    for kind in sorted(step.shrinks):
        case = LARGE[kind]
        before, after = _float_size(case), len(_file(_applied(step, case), case))
        rule = f"the file must shrink by a tenth at least, from {before} to {after} bytes"
        assert after <= 0.9 * before, f"{case.name}: {rule}"


def keeps_inputs_and_outputs(step: Step) -> None:
    """Any batch size, the same number, shapes and types of outputs."""
    for case in _chosen():
        model = case.build()
        small = _applied(step, case)
        for rows in (1, 2, 7):
            expected, found = answers(model, case.data(rows=rows)), answers(small, case.data(rows=rows))
            shapes = [(tuple(t.shape), t.dtype) for t in expected], [(tuple(t.shape), t.dtype) for t in found]
            assert shapes[0] == shapes[1], f"{case.name}: outputs must be {shapes[0]}, got {shapes[1]}"


def agrees_with_the_original(step: Step) -> None:
    """On data like the calibration data, the cosine between the answers is above 0.99."""
    for case in _chosen():
        model = case.build()
        small = _applied(step, case)
        data = case.data(rows=64, seed=5)
        for index, (want, have) in enumerate(zip(answers(model, data), answers(small, data), strict=True)):
            cosine = similarity(want, have)
            assert cosine > 0.99, f"{case.name}: output {index} must agree with the original, got cosine {cosine:.4f}"


CHECKS: tuple[Callable[[Step], None], ...] = (
    leaves_its_input_untouched,
    leaves_global_state_untouched,
    repeats_itself,
    round_trips_through_json,
    shrinks,
    keeps_inputs_and_outputs,
    agrees_with_the_original,
)


def answers(model: torch.nn.Module, inputs: Tensors) -> Tensors:
    """The outputs as a tuple."""
    with torch.no_grad():
        found = model(*inputs)
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def similarity(left: torch.Tensor, right: torch.Tensor) -> float:
    """Cosine between two tensors, each taken as one vector, however small; NaN where one is zero.

    >>> similarity(torch.tensor([1e-20, 0.0]), torch.tensor([[2.0, 0.0]]))
    1.0
    """
    # torch's own cosine_similarity takes lengths below 1e-8 for 1e-8.
    one, other = left.flatten().double(), right.flatten().double()
    return float(one @ other / (one.norm() * other.norm()))


def content(program: ExportedProgram) -> dict[str, object]:
    """All that a file is written from: operations with their arguments and types, bounds, every tensor's bytes.

    >>> model = torch.nn.Linear(2, 1)
    >>> list(content(export_program(model, (torch.ones(2, 2),))))
    ['graph', 'types', 'signature', 'bounds', 'tensor weight', 'tensor bias']
    """
    bounds = {"signature": repr(program.graph_signature), "bounds": repr(program.range_constraints)}
    return _operations(program.graph_module) | bounds | _bytes_of({**program.state_dict, **program.constants})


def content_of_graph(graph: torch.fx.GraphModule) -> dict[str, object] | None:
    """As `content`, without the export that takes a second; None where the graph calls what only an export looks into.

    >>> graph = capture(torch.nn.Linear(2, 1), (torch.ones(2, 2),))
    >>> list(content_of_graph(graph))
    ['graph', 'types', 'code', '_in_spec', '_out_spec', 'tensor weight', 'tensor bias']
    >>> content_of_graph(torch.fx.symbolic_trace(torch.nn.Linear(2, 1))) is None  # Python's own function
    True
    """
    tensors: dict[str, object] = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    for prefix, module in _graphs(graph):
        for node in module.graph.nodes:
            if node.op == "get_attr":
                tensors[f"{prefix}{node.target}"] = operator.attrgetter(node.target)(module)
            elif node.op not in ("placeholder", "output") and not _says_all(node.target):
                return None
    plain = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if any(not isinstance(tensors[name], torch.fx.GraphModule) for name in tensors.keys() - plain.keys()):
        return None
    parts = ("code", "_in_spec", "_out_spec")
    forms = {part: [repr(getattr(module, part, None)) for _, module in _graphs(graph)] for part in parts}
    return _operations(graph) | forms | _bytes_of(plain)


def _says_all(target: object) -> bool:
    """Whether the name says what is called: an operation that is registered with torch, or arithmetic on sizes."""
    registered = isinstance(target, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
    return registered or getattr(target, "__module__", "") == "_operator"


def _content_of(model: torch.nn.Module, case: Case) -> dict[str, object]:
    """The content of what is deployed for the model, exported only where that must be."""
    deployed = as_deployed(model)
    found = content_of_graph(deployed) if isinstance(deployed, torch.fx.GraphModule) else None
    return content(export_program(deployed, case.data(rows=2))) if found is None else found


def _graphs(module: torch.nn.Module) -> list[tuple[str, torch.fx.GraphModule]]:
    """The graph and those it holds, by the prefix of their names."""
    found = module.named_modules()
    return [(f"{name}." if name else "", each) for name, each in found if isinstance(each, torch.fx.GraphModule)]


def _operations(module: torch.fx.GraphModule) -> dict[str, object]:
    nodes = [node for _, graph in _graphs(module) for node in graph.graph.nodes]
    return {
        "graph": [(node.op, node.name, str(node.target), repr(node.args), repr(node.kwargs)) for node in nodes],
        "types": [repr(node.meta.get("val")) for node in nodes],
    }


def _bytes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    return {
        f"tensor {name}": (
            str(tensor.dtype),
            tuple(tensor.shape),
            tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def _chosen() -> list[Case]:
    return [*(CASES[name] for name in _MODELS), LARGE["linear"]]


@functools.cache
def _float_size(case: Case) -> int:
    """Bytes of the model's file before any step."""
    return len(_file(case.build(), case))


def _file(model: torch.nn.Module, case: Case) -> bytes:
    """The model as ONNX."""
    inputs = [f"input_{index}" for index in range(len(case.shapes))]
    outputs = [f"output_{index}" for index in range(case.outputs)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(export_program(model, case.data(rows=2)), path, inputs=inputs, outputs=outputs)
        return path.read_bytes()
