"""Page-locked memory of the host, which a GPU reads and writes by itself, without torch: by ctypes on CUDA's runtime.

From other memory the driver copies through a page-locked buffer of its own first, and waits for that.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fettle.core.signature import Array

_log = logging.getLogger("fettle.runtime")

# The names that it goes by on Linux, the newest first.
_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
_SUCCESS = 0
# Page-locked for every context of the process, not only for the one of the thread that asked.
_PORTABLE = 1
_SMALLEST_BITS = 12  # a page
_LIMIT_BYTES = 256 * 2**20  # a batch of 32 photographs of 224 pixels has 18 MiB, and the system lacks what is locked


class CudaHost:
    """What is needed of CUDA's runtime library, on one device. Numbers that come back are CUDA's error codes."""

    def __init__(self, library: Any, device: int) -> None:
        self._library, self._device = library, device
        pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
        for name, arguments in (
            ("cudaHostAlloc", [ctypes.POINTER(pointer), size, flags]),
            ("cudaFreeHost", [pointer]),
            ("cudaSetDevice", [ctypes.c_int]),
            ("cudaGetLastError", []),
        ):
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int

    def allocate(self, size: int) -> int:
        """The address of that many page-locked bytes. Raises MemoryError."""
        address = ctypes.c_void_p()
        code = self._enter() or self._library.cudaHostAlloc(ctypes.byref(address), size, _PORTABLE)
        if code == _SUCCESS and address.value:
            return address.value
        # Else the error would stay on this thread, and ONNX Runtime would take it for its next kernel's.
        self._library.cudaGetLastError()
        raise MemoryError(f"CUDA's runtime gave error {code} for {size} page-locked bytes")

    def free(self, address: int) -> None:
        """Give them back. A failure is the driver's shutting down, when all memory goes anyway."""
        if self._enter() or self._library.cudaFreeHost(address):
            self._library.cudaGetLastError()

    def _enter(self) -> int:
        # A thread begins on device 0, and the first call there would make a context on it, of some 300 MB.
        return int(self._library.cudaSetDevice(self._device))


class _Lease:
    """A block that arrays lie in: the last of them takes it along, and the block waits for its next use."""

    __slots__ = ("__array_interface__", "__weakref__", "_address", "_memory", "_power")

    def __init__(
        self, memory: PinnedMemory, power: int, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._memory, self._power, self._address = memory, power, address
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": (address, False)}

    def __del__(self) -> None:
        self._memory.take_back(self._power, self._address)


class PinnedMemory:
    """Arrays in page-locked memory, whose blocks are used again when nothing refers to their arrays any more.

    Blocks are powers of two, and all together at most `limit_bytes`, those that wait for use included; beyond that,
    and where CUDA's runtime is missing or refuses (which is logged once), arrays are in ordinary memory: they are
    good for the same, and slower to copy from and to the device. Safe to use from several threads.
    """

    def __init__(self, host: CudaHost | None, *, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._host = host
        self._limit = limit_bytes
        self._free: list[list[int]] = [[] for _ in range(limit_bytes.bit_length())]  # by the power of two
        self._bytes = 0
        self._lock = threading.Lock()
        if host is not None:
            weakref.finalize(self, _free_all, host, self._free).atexit = False

    @property
    def locked_bytes(self) -> int:
        """How much is page-locked, in use or waiting."""
        return self._bytes

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """A new array, not filled."""
        kind = np.dtype(dtype)
        size = max(1, kind.itemsize * math.prod(shape))
        power = max(_SMALLEST_BITS, (size - 1).bit_length())
        address = None if kind.hasobject else self._block(power)
        if address is None:
            return np.empty(shape, kind)
        return np.asarray(_Lease(self, power, address, shape, kind))

    def hold(self, array: Array) -> Array:
        """The array itself where it is of here and in one piece, else a copy that is, with native numbers."""
        if array.flags.c_contiguous and array.dtype.isnative and _is_leased(array):
            return array
        native = array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")
        copy = self.empty(array.shape, native)
        copy[...] = array
        return copy

    def take_back(self, power: int, address: int) -> None:
        """A block that nothing refers to. The collector may call this in the middle of anything: it must not lock."""
        self._free[power].append(address)

    def _block(self, power: int) -> int | None:
        if power >= len(self._free):
            return None
        try:
            return self._free[power].pop()
        except IndexError:
            return self._another(power)

    def _another(self, power: int) -> int | None:
        with self._lock:
            if self._host is None:
                return None
            self._make_room(1 << power)
            if self._bytes + (1 << power) > self._limit:
                return None
            try:
                address = self._host.allocate(1 << power)
            except MemoryError as problem:
                _log.warning("%s: copies to and from the GPU go through ordinary memory, slower", problem)
                self._host = None
                return None
            self._bytes += 1 << power
            return address

    def _make_room(self, size: int) -> None:
        """Free blocks of other sizes that wait for use, the largest first, where the limit leaves no room."""
        assert self._host is not None
        for power in reversed(range(len(self._free))):
            while self._bytes + size > self._limit:
                try:
                    address = self._free[power].pop()
                except IndexError:
                    break
                self._host.free(address)
                self._bytes -= 1 << power


def _is_leased(array: Array) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, _Lease)


def _free_all(host: CudaHost, free: list[list[int]]) -> None:
    for addresses in free:
        while addresses:
            host.free(addresses.pop())


def find_library() -> Any | None:
    """CUDA's runtime, the one that this process has loaded already rather than another; None where there is none."""
    loaded = getattr(os, "RTLD_NOLOAD", None)
    for mode in ([loaded | os.RTLD_NOW] if loaded is not None else []) + [ctypes.DEFAULT_MODE]:
        for name in _LIBRARIES:
            try:
                return ctypes.CDLL(name, mode=mode)
            except OSError:
                continue
    return None


@functools.cache
def pinned_memory(device: int) -> PinnedMemory:
    """This process's, for that GPU: one for all models, so that their limit is one too."""
    library = find_library()
    if library is None:
        _log.warning("found no %s: copies to and from the GPU go through ordinary memory, slower", _LIBRARIES[-1])
    return PinnedMemory(None if library is None else CudaHost(library, device))
