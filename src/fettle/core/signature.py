"""What goes into a model and what comes out: names, data types, named dimensions, image preprocessing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fettle.core.errors import InvalidInput, UsageError

Array = NDArray[Any]
Activation = Literal["softmax", "none"]

# The data types of the Open Inference Protocol that numpy has, by numpy's name.
DTYPES = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
    "float16", "float32", "float64",
)  # fmt: skip
_SMALL = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor: a string in `shape` names a free dimension, such as ("batch", 3, 32, 32)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"tensor '{self.name}': dtype must be one of {', '.join(DTYPES)}, got '{self.dtype}'")

    def check(self, array: Array) -> None:
        """Raise InvalidInput unless the array has this data type and shape and every value is finite."""
        # numpy spells a type's name in Python, at 5 µs: it is asked for only where the types differ.
        if array.dtype != self.dtype and array.dtype.name != self.dtype:
            raise InvalidInput(f"input '{self.name}' must be {self.dtype}, got {array.dtype.name}")
        fits = len(array.shape) == len(self.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            raise InvalidInput(f"input '{self.name}' must have shape {list(self.shape)}, got {list(array.shape)}")
        if 0 in array.shape:
            raise InvalidInput(f"input '{self.name}' must not be empty, got shape {list(array.shape)}")
        if array.dtype.kind == "f" and not _all_finite(array):
            raise InvalidInput(f"input '{self.name}' must be finite, got NaN or infinity")


def _all_finite(array: Array) -> bool:
    """A finite sum of squares rules NaN and infinity out; one that overflowed decides nothing.

    For small arrays that is twice as fast as a mask, and for large ones BLAS would start threads.
    """
    if array.size <= _SMALL and array.itemsize >= 4 and math.isfinite(np.vdot(array, array)):
        return True
    return bool(np.isfinite(array).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePreprocess:
    """From a decoded image to one NCHW row: convert, resize the shorter side, crop the center, scale, normalize.

    mode: "RGB" (three channels) or "L" (one).
    resize: length of the shorter side in pixels, bilinear with antialiasing; crop: side of the central square.
    mean, std: one value per channel, for pixel values divided by 255.
    """

    mode: Literal["RGB", "L"] = "RGB"
    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        channels = len(self.mode)
        if not 1 <= self.crop <= self.resize <= 4096:
            raise UsageError(
                f"image preprocessing needs 1 <= crop <= resize <= 4096, got {self.crop=} and {self.resize=}"
            )
        if len(self.mean) != channels or len(self.std) != channels:
            raise UsageError(
                f"image preprocessing in mode {self.mode} needs {channels} values in mean and in std, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not all(map(math.isfinite, self.mean)) or not all(value > 0 and math.isfinite(value) for value in self.std):
            raise UsageError(
                f"image preprocessing needs finite mean and positive std, got mean {self.mean}, std {self.std}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of what comes out."""
        return (len(self.mode), self.crop, self.crop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The contract of an artifact. `activation` turns the first output into class probabilities.

    >>> x = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
    >>> y = TensorSpec(name="y", dtype="float32", shape=("batch", 3))
    >>> signature = Signature(inputs=(x,), outputs=(y,))
    >>> signature.check({"x": np.zeros((5, 2), np.float32)})
    5
    >>> signature.check({"z": np.zeros((5, 2), np.float32)})
    Traceback (most recent call last):
    fettle.core.errors.InvalidInput: inputs must be exactly x, got z
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    classes: tuple[str, ...] = ()
    activation: Activation = "none"
    image: ImagePreprocess | None = None

    def check(self, arrays: Mapping[str, Array]) -> int:
        """Raise InvalidInput unless the named arrays fit; return the number of rows they all share."""
        expected = [spec.name for spec in self.inputs]
        if sorted(arrays) != sorted(expected):
            raise InvalidInput(f"inputs must be exactly {', '.join(expected)}, got {', '.join(arrays) or 'none'}")
        sizes: dict[str, tuple[str, int]] = {}
        for spec in self.inputs:
            array = arrays[spec.name]
            spec.check(array)
            for dimension, size in zip(spec.shape, array.shape, strict=True):
                if isinstance(dimension, str):
                    where, seen = sizes.setdefault(dimension, (spec.name, size))
                    if seen != size:
                        raise InvalidInput(
                            f"dimension '{dimension}' must be one size, "
                            f"got {seen} in '{where}' and {size} in '{spec.name}'"
                        )
        return int(arrays[expected[0]].shape[0])

    def probabilities(self, output: Array) -> Array:
        """Class probabilities, float64, from the model's first output of shape (rows, classes)."""
        values = output.astype(np.float64)
        if self.activation == "none":
            return values
        powers = np.exp(values - values.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]
