from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.core import codec
from fettle.core.errors import UsageError

BITS = range(2, 17)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
def test_an_affine_scheme_has_all_levels(bits, signed):
    scheme = Scheme(bits=bits, signed=signed)
    assert scheme.levels == 2**bits
    assert scheme.highest - scheme.lowest == 2**bits - 1
    assert scheme.lowest == (-(2 ** (bits - 1)) if signed else 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("narrow", [None, False, True])
def test_a_narrow_scheme_is_even_around_its_middle(bits, signed, narrow):
    scheme = Scheme(bits=bits, signed=signed, symmetric=True, narrow=narrow)
    is_narrow = signed if narrow is None else narrow
    assert scheme.narrow is is_narrow
    assert scheme.levels == 2**bits - is_narrow
    assert (scheme.highest - scheme.middle == scheme.middle - scheme.lowest) == is_narrow


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
def test_the_type_is_the_smallest_that_holds_every_level(bits, signed):
    scheme = Scheme(bits=bits, signed=signed)
    limits = torch.iinfo(scheme.dtype)
    assert limits.min <= scheme.lowest
    assert limits.max >= scheme.highest
    assert limits.bits == (8 if bits <= 8 else 16)
    ends = torch.tensor([scheme.lowest, scheme.highest]).to(scheme.dtype)
    assert ends.tolist() == [scheme.lowest, scheme.highest]


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32, 8.0, "8"])
def test_other_bits_are_refused(bits):
    with pytest.raises(UsageError, match="2 to 16 bits"):
        Scheme(bits=bits)


@pytest.mark.parametrize("group", [0, -1])
def test_a_group_holds_something(group):
    with pytest.raises(UsageError, match="at least 1"):
        Scheme(group=group)


@pytest.mark.parametrize("signed", [False, True])
def test_only_a_symmetric_scheme_is_narrow(signed):
    with pytest.raises(UsageError, match="symmetric"):
        Scheme(signed=signed, narrow=True)


def test_a_scheme_is_a_value():
    assert Scheme(signed=True, symmetric=True) == Scheme(signed=True, symmetric=True, narrow=True)
    assert len({Scheme(), Scheme(), Scheme(bits=4)}) == 2
    with pytest.raises(AttributeError):
        Scheme().bits = 4


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(bits=4, signed=True, symmetric=True, axis=1, group=32)])
def test_a_scheme_goes_through_json(scheme):
    assert codec.from_json(Scheme, codec.to_json(scheme), where="here") == scheme


def slow_place(index, shape, scheme):
    """Where the parameter of the entry at `index` is."""
    if scheme.axis is None and scheme.group is None:
        return ()
    axis = (-1 if scheme.axis is None else scheme.axis) % len(shape)
    if scheme.group is None:
        return (index[axis],)
    return tuple(i // scheme.group if a == axis else i for a, i in enumerate(index))


@st.composite
def shaped(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    return shape, Scheme(axis=axis, group=draw(st.none() | st.integers(1, 7)))


@given(shaped())
def test_every_entry_meets_its_own_parameter(case):
    shape, scheme = case
    x = torch.zeros(shape)
    expected = scheme.parameter_shape(shape)
    parameter = torch.arange(math.prod(expected)).reshape(expected)
    spread = scheme.spread(parameter, x).expand(shape)
    for index in itertools.product(*map(range, shape)):
        assert spread[index] == parameter[slow_place(index, shape, scheme)]


@given(shaped())
def test_rows_hold_the_entries_of_each_parameter(case):
    shape, scheme = case
    x = torch.arange(1, math.prod(shape) + 1).reshape(shape).float()
    expected = scheme.parameter_shape(shape)
    rows = scheme.rows(x)
    assert rows.shape[0] == math.prod(expected)
    members = {place: [] for place in itertools.product(*map(range, expected))}
    for index in itertools.product(*map(range, shape)):
        members[slow_place(index, shape, scheme)].append(x[index].item())
    for row, place in zip(rows.tolist(), members, strict=True):
        assert [value for value in row if value] == members[place]


@pytest.mark.parametrize(("axis", "shape"), [(0, ()), (2, (3, 4)), (-3, (3, 4))])
@pytest.mark.parametrize("group", [None, 2])
def test_an_axis_the_tensor_lacks_is_refused(axis, shape, group):
    with pytest.raises(UsageError, match="axis"):
        Scheme(axis=axis, group=group).parameter_shape(shape)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(axis=0), Scheme(group=2), Scheme(axis=0, group=2)])
def test_parameters_of_another_shape_are_refused(scheme):
    with pytest.raises(UsageError, match="needs scales of shape"):
        scheme.spread(torch.zeros(7, 7, 7), torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(axis=0), Scheme(group=2), Scheme(axis=0, group=2)])
def test_an_empty_tensor_has_its_shape_of_parameters(shape, scheme):
    expected = scheme.parameter_shape(shape)
    assert scheme.rows(torch.zeros(shape)).shape[0] == math.prod(expected)
    assert scheme.spread(torch.zeros(expected), torch.zeros(shape)).expand(shape).shape == shape
