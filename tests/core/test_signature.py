from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fettle.core.errors import InvalidInput, UsageError
from fettle.core.signature import DTYPES, ImagePreprocess, Signature, TensorSpec

X = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
TOKENS = TensorSpec(name="tokens", dtype="int64", shape=("batch", "length"))
MASK = TensorSpec(name="mask", dtype="bool", shape=("batch", "length"))


def floats(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_the_number_of_rows_is_returned(rows):
    assert Signature(inputs=(X,), outputs=()).check({"x": floats(rows, 2)}) == rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_data_type_is_its_own(dtype):
    spec = TensorSpec(name="x", dtype=dtype, shape=("batch",))
    for other in DTYPES:
        array = np.zeros(1, other)
        if other == dtype:
            spec.check(array)
        else:
            with pytest.raises(InvalidInput, match=f"must be {dtype}, got {other}"):
                spec.check(array)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (floats(3, 3), r"must have shape \['batch', 2\], got \[3, 3\]"),
        (floats(3), "must have shape"),
        (floats(3, 2, 1), "must have shape"),
        (np.float32(3.0), "must have shape"),
        (floats(0, 2), "must not be empty"),
        (np.array([[np.nan, 0]], np.float32), "must be finite"),
        (np.array([[0, np.inf]], np.float32), "must be finite"),
        (np.zeros((1, 2)), "must be float32, got float64"),
        (np.array([["a", "b"]]), "must be float32, got str"),
        (np.array([[None, {}]]), "must be float32, got object"),
    ],
)
def test_what_does_not_fit_is_named(array, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        Signature(inputs=(X,), outputs=()).check({"x": np.asarray(array)})
    assert "'x'" in str(caught.value)


@pytest.mark.parametrize("given_names", [[], ["y"], ["x", "y"]])
def test_names_must_be_exactly_those(given_names):
    with pytest.raises(InvalidInput, match="inputs must be exactly x"):
        Signature(inputs=(X,), outputs=()).check({name: floats(1, 2) for name in given_names})


@pytest.mark.parametrize(
    ("tokens", "mask", "dimension"), [((2, 5), (3, 5), "batch"), ((2, 5), (2, 6), "length"), ((2, 5), (2, 5), None)]
)
def test_a_named_dimension_is_one_size_everywhere(tokens, mask, dimension):
    signature = Signature(inputs=(TOKENS, MASK), outputs=())
    named = {"tokens": np.zeros(tokens, np.int64), "mask": np.zeros(mask, bool)}
    if dimension is None:
        assert signature.check(named) == 2
    else:
        with pytest.raises(InvalidInput, match=f"dimension '{dimension}' must be one size"):
            signature.check(named)


@given(arrays(np.float32, (3, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_softmax_is_a_distribution_for_any_logits(logits):
    signature = Signature(inputs=(X,), outputs=(), activation="softmax")
    found = signature.probabilities(logits)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    assert (found >= 0).all()
    for row, logit in zip(found, logits.astype(float), strict=True):
        slow = [1.0 / sum(np.exp(min(other - one, 700.0)) for other in logit) for one in logit]
        np.testing.assert_allclose(row, slow, atol=1e-12, rtol=1e-6)


def test_without_activation_outputs_are_probabilities_already():
    values = np.array([[0.25, 0.75]], np.float32)
    assert Signature(inputs=(X,), outputs=()).probabilities(values).tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("dtype", ["float", "bfloat16", "FP32", "", "object"])
def test_unknown_data_types_are_refused(dtype):
    with pytest.raises(UsageError, match="dtype must be one of"):
        TensorSpec(name="x", dtype=dtype, shape=("batch",))


@pytest.mark.parametrize(
    "options",
    [
        {"crop": 0},
        {"crop": 300},
        {"resize": 5000, "crop": 1},
        {"mean": (0.5,)},
        {"mode": "L"},
        {"std": (0.0, 1.0, 1.0)},
        {"std": (-1.0, 1.0, 1.0)},
        {"std": (float("nan"), 1.0, 1.0)},
        {"mean": (float("inf"), 0.0, 0.0)},
    ],
    ids=str,
)
def test_bad_preprocessing_is_refused(options):
    with pytest.raises(UsageError, match="image preprocessing"):
        ImagePreprocess(**options)


def test_the_default_preprocessing_is_that_of_imagenet():
    assert ImagePreprocess().shape == (3, 224, 224)
    assert ImagePreprocess(mode="L", resize=28, crop=28, mean=(0.5,), std=(0.5,)).shape == (1, 28, 28)


@pytest.mark.parametrize("size", [1, 3, 8192, 8193])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_value_that_is_not_finite_is_found(size, value, dtype):
    spec = TensorSpec(name="x", dtype=dtype, shape=("batch",))
    array = np.full(size, np.finfo(dtype).max, dtype)  # whose squares overflow
    spec.check(array)
    array[size // 2] = value
    with pytest.raises(InvalidInput, match="must be finite"):
        spec.check(array)


def test_values_that_are_not_contiguous_are_looked_at_too():
    whole = np.zeros((4, 4), np.float32)
    whole[:, 1] = np.nan
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
    spec.check(whole[:, ::2])
    with pytest.raises(InvalidInput, match="must be finite"):
        spec.check(whole[:, 1::2])
