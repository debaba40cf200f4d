"""Sixteen bits: what is stored and computed in them, what is not, and that the result is near the original."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fettle.compress.capture import export_program
from fettle.compress.quantize.half import Half
from fettle.compress.step import Context
from fettle.core.errors import DataError, UsageError
from fettle.testing.models import CASES, LARGE
from fettle.testing.steps import answers, captured, context_for

aten = torch.ops.aten
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Measured 44 to 54 dB and 64 to 75 dB over all models: a rounding of 2⁻⁹ or 2⁻¹² at each layer.
FLOORS_DB = {"bfloat16": 38.0, "float16": 58.0}


def sqnr_db(want, have):
    want, have = want.detach(), have.detach()
    return float(10 * torch.log10(want.square().sum() / (want - have).square().sum()))


def bytes_of(model):
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def apply(model, x, notes=None, **fields):
    return Half(**fields).apply(model, Context(example=(x,), note=(notes if notes is not None else []).append))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", [*CASES.values(), *LARGE.values()], ids=lambda case: case.name)
def test_every_model_answers_nearly_as_before(case, dtype):
    half = Half(dtype=dtype).apply(captured(case), context_for(case))
    for rows in (1, 16):
        data = case.data(rows=rows, seed=3)
        for want, have in zip(answers(case.build(), data), answers(half, data), strict=True):
            assert have.dtype == want.dtype == torch.float32
            assert sqnr_db(want, have) > FLOORS_DB[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", [*CASES.values(), *LARGE.values()], ids=lambda case: case.name)
def test_the_weights_take_half_the_bytes(case, dtype):
    half = Half(dtype=dtype).apply(captured(case), context_for(case))
    assert {TYPES[dtype]} <= {value.dtype for value in half.state_dict().values()}
    assert bytes_of(half) < 0.6 * bytes_of(case.build())


@pytest.mark.parametrize("dtype", TYPES)
def test_a_linear_layer_is_what_the_definition_says(dtype, rng_tensor):
    x, weight, bias = rng_tensor(5, 7), rng_tensor(3, 7), rng_tensor(3)
    layer = nn.Linear(7, 3)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    found = apply(layer.eval(), x, dtype=dtype)(x)
    kind = TYPES[dtype]
    rounded = [value.to(kind).double() for value in (x, weight, bias)]
    exact = rounded[0] @ rounded[1].T + rounded[2]
    # One rounding of the sum to 16 bits, and the sum itself in float32.
    assert torch.allclose(found.double(), exact, rtol=torch.finfo(kind).eps, atol=1e-5)


@pytest.fixture
def rng_tensor():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e30]),
    seed=st.integers(0, 2**16),
)
def test_bfloat16_keeps_the_range_of_float32(width, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, 3, bias=False).eval()
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(3, width, generator=generator))
    x = torch.randn(4, width, generator=generator)
    found = apply(layer, x)(x)
    bound = (layer.weight.abs().double() @ x.abs().double().T).T * 2**-6
    assert bool(((found.double() - layer(x).double()).abs() <= bound).all())


def types_of(graph, target):
    return [node.meta["val"].dtype for node in graph.graph.nodes if node.target == target]


def test_a_sum_with_a_float_tensor_stays_float():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.layer(x)

    graph = apply(Residual().eval(), torch.ones(2, 4))
    assert types_of(graph, aten.add.Tensor) == [torch.float32]


def test_values_stay_in_16_bits_between_the_layers_of_a_residual_network():
    case = CASES["residual"]
    graph = Half().apply(captured(case), context_for(case))
    for target in (aten.conv2d.default, aten.relu.default, aten.add.Tensor, aten.linear.default):
        assert set(types_of(graph, target)) == {torch.bfloat16}, target
    conversions = [node for node in graph.graph.nodes if node.target == aten._to_copy.default]
    assert len(conversions) == 4, "in, out, and around the mean over positions"


def test_norms_and_means_of_a_transformer_stay_float():
    case = CASES["norm_first"]
    graph = Half().apply(captured(case), context_for(case))
    for target in (aten.layer_norm.default, aten.mean.dim):
        assert set(types_of(graph, target)) == {torch.float32}, target
    assert set(types_of(graph, aten.linear.default)) == {torch.bfloat16}


def test_what_the_graph_says_of_its_types_is_so():
    for name in ("concatenation", "norm_last", "two_outputs", "pad_shortcut"):
        case = CASES[name]
        graph = Half().apply(captured(case), context_for(case))
        seen = {}

        class Watch(torch.fx.Interpreter):
            def run_node(self, node, seen=seen):
                seen[node.name] = super().run_node(node)
                return seen[node.name]

        with torch.no_grad():
            Watch(graph).run(*case.data(rows=2))
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target is not operator.getitem and torch.is_tensor(seen[node.name]):
                assert seen[node.name].dtype == node.meta["val"].dtype, (name, node)


class Tied(nn.Module):
    """An embedding whose table is the last layer's weight too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)

    def forward(self, tokens):
        return self.table(tokens).mean(dim=1) @ self.table.weight.T


def test_a_table_that_is_a_weight_too_is_stored_once():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tied().eval()
    tokens = torch.arange(12).reshape(3, 4)
    half = apply(model, tokens)
    assert [value.dtype for value in half.state_dict().values()] == [torch.bfloat16]
    assert sqnr_db(model(tokens), half(tokens)) > 40


def test_layers_are_kept_in_float_on_request():
    case, notes = CASES["residual"], []
    graph = Half(keep_float=("conv2",)).apply(captured(case), Context(example=case.data(rows=2), note=notes.append))
    assert notes == ["conv2: stays float: on request"]
    assert sorted(map(str, types_of(graph, aten.conv2d.default))).count("torch.float32") == 1


def test_a_layer_whose_weights_float16_cannot_hold_stays_float():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight[1, 2] = 1e5
    notes, x = [], torch.full((2, 4), 1e-3)
    half = apply(model, x, notes, dtype="float16")
    assert notes == ["0: stays float: its largest weight, 1e+05, is beyond 65504"]
    assert torch.allclose(half(x), model(x), rtol=5e-3, atol=1e-2)
    assert torch.isfinite(half(x)).all()
    notes.clear()
    apply(model, x, notes)  # bfloat16 has float32's range
    assert notes == []


def test_a_model_without_such_layers_says_so():
    notes, x = [], torch.ones(2, 3)
    half = apply(nn.ReLU().eval(), x, notes)
    assert notes == ["nothing is computed in 16 bits: the model has no layer of a kind that can be"]
    assert torch.equal(half(-x), torch.zeros(2, 3))


def test_layers_in_double_are_left_alone():
    x = torch.ones(2, 3, dtype=torch.float64)
    model = nn.Linear(3, 2).double().eval()
    assert torch.equal(apply(model, x)(x), model(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight[0, 0] = value
    with pytest.raises(DataError, match="NaN or infinity in 0"):
        apply(model, torch.ones(2, 3))


@pytest.mark.parametrize("fields", [{"dtype": "float8"}, {"dtype": ""}])
def test_a_type_that_has_no_16_bits_is_refused(fields):
    with pytest.raises(UsageError, match='"bfloat16" or "float16"'):
        Half(**fields)


def test_a_name_of_no_layer_is_refused():
    with pytest.raises(UsageError, match="names nothing that would be quantized: 'nope'"):
        apply(nn.Linear(3, 2).eval(), torch.ones(2, 3), keep_float=("nope",))


def test_the_precision_follows_from_the_type():
    assert (Half().precision, Half(dtype="float16").precision) == ("bf16", "fp16")
    assert Half.from_spec(Half(dtype="float16", keep_float=("a",)).spec()) == Half(dtype="float16", keep_float=("a",))


def test_the_batch_stays_free():
    case = CASES["norm_first"]
    half = Half().apply(captured(case), context_for(case))
    program = export_program(half, case.data(rows=2))
    for rows in (1, 5):
        data = case.data(rows=rows)
        assert torch.equal(answers(program.module(check_guards=False), data)[0], answers(half, data)[0])
