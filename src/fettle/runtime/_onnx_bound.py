"""A session of ONNX Runtime whose inputs and outputs lie in page-locked memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from fettle.core.runner import Runner
from fettle.core.signature import DTYPES, Array, Signature
from fettle.runtime._pinned import PinnedMemory

_log = logging.getLogger("fettle.runtime")

_DTYPES = {f"tensor({name})": name for name in DTYPES} | {"tensor(float)": "float32", "tensor(double)": "float64"}


class Bound(Runner):
    """Answers as `session.run` does, bit for bit, by its binding: without copies through ordinary memory.

    An input that is not in page-locked memory is copied there; one from `empty` is there already. An output lies
    there too where the graph gives its shape by names of the inputs' dimensions, and is the caller's own: its memory
    is used again only when nothing refers to it any more. All other outputs are ONNX Runtime's to allocate.
    """

    def __init__(self, session: Any, signature: Signature, memory: PinnedMemory) -> None:
        super().__init__(signature)
        self._session, self._memory = session, memory
        self._binds = True
        self._names = [spec.name for spec in signature.outputs]
        self._given = {item.name: tuple(item.shape) for item in session.get_inputs()}
        self._declared = {
            item.name: (_DTYPES[item.type], tuple(item.shape)) for item in session.get_outputs() if item.type in _DTYPES
        }

    def empty(self, name: str, shape: tuple[int, ...]) -> Array:
        return self._memory.empty(shape, self.input_dtype(name))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        held = {name: self._memory.hold(array) for name, array in inputs.items()}
        if not self._binds:
            return self._run_plainly(held)
        try:
            return self._run_bound(held)
        except Exception as problem:
            answers = self._run_plainly(held)  # where this fails as well, its error is the one to tell
            self._binds = False
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
            _log.warning("the model failed with its outputs bound, and runs without that from now on: %s", reason)
            return answers

    def _run_plainly(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._names, self._session.run(self._names, dict(inputs)), strict=True))

    def _run_bound(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        room = self._room(inputs)
        binding = self._session.io_binding()  # a new one each time: nothing of an earlier run is in it
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in self._names:
            own = room.get(name)
            if own is None:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_output(name, "cpu", 0, own.dtype, own.shape, own.ctypes.data)
        # Binding begins to copy on a stream that need not be the run's. From ordinary memory that has ended when it
        # returns; from page-locked memory only this waits for it.
        binding.synchronize_inputs()
        try:
            self._session.run_with_iobinding(binding)
        finally:
            binding.synchronize_outputs()  # else a copy that a failed run began could end in memory of the next one
        values = zip(self._names, binding.get_outputs(), strict=True)
        return {name: _taken(value, room.get(name)) for name, value in values}

    def _room(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Memory for each output whose shape is known before the run."""
        sizes: dict[str, int] = {}
        for name, array in inputs.items():
            for dimension, size in zip(self._given.get(name, ()), array.shape, strict=False):
                if isinstance(dimension, str):
                    sizes.setdefault(dimension, size)
        found = {}
        for name, (dtype, dimensions) in self._declared.items():
            shape = [dimension if isinstance(dimension, int) else sizes.get(dimension) for dimension in dimensions]
            known = tuple(size for size in shape if size is not None)
            if len(known) == len(shape):
                found[name] = self._memory.empty(known, dtype)
        return found


def _taken(value: Any, own: Array | None) -> Array:
    """The output: our array where ONNX Runtime wrote into it, else a copy of where it says that the output is.

    For an output that is one of the inputs it leaves the memory bound for it as it was, and gives the input's.
    """
    if own is not None and value.data_ptr() == own.ctypes.data and value.shape() == list(own.shape):
        return own
    return np.array(value.numpy())
