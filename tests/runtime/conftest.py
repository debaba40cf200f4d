"""Folders with exported models, made once for all tests of this room."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from fettle.runtime.eager import Eager
from fettle.runtime.onnxruntime import OnnxRuntime
from fettle.testing.models import CASES
from fettle.testing.runtimes import export_case


@pytest.fixture(scope="session")
def _masters(tmp_path_factory):
    held = {}

    def master(runtime, case):
        key = runtime.__name__, case
        if key not in held:
            folder = tmp_path_factory.mktemp("export") / "model"
            held[key] = folder, export_case(runtime(), CASES[case], folder)
        return held[key]

    return master


@pytest.fixture
def exported(_masters, tmp_path):
    """A function (runtime class, case name) -> (folder of its own, signature)."""

    def copy(runtime, case):
        folder, signature = _masters(runtime, case)
        own = tmp_path / f"{runtime.__name__}-{case}"
        shutil.copytree(folder, own)
        return own, signature

    return copy


@pytest.fixture
def eager_mlp(exported):
    return exported(Eager, "mlp")


@pytest.fixture
def onnx_mlp(exported):
    return exported(OnnxRuntime, "mlp")


class _Function:
    """As ctypes has it: called with what its argument types allow, once they are set."""

    def __init__(self, call):
        self._call = call
        self.argtypes = self.restype = None

    def __call__(self, *arguments):
        assert self.argtypes is not None, "ctypes would cut a pointer to 32 bits"
        assert self.restype is ctypes.c_int
        assert len(arguments) == len(self.argtypes)
        return self._call(*arguments)


class FakeCuda:
    """alloc_code, device_code: what the calls answer; addresses in `blocks` are held, `freed` counts."""

    def __init__(self, *, alloc_code=0, device_code=0, free_code=0):
        self.alloc_code, self.device_code, self.free_code = alloc_code, device_code, free_code
        self.blocks, self.flags, self.devices, self.freed, self.cleared = {}, [], [], 0, 0
        self.cudaHostAlloc = _Function(self._alloc)
        self.cudaFreeHost = _Function(self._free)
        self.cudaSetDevice = _Function(self._set_device)
        self.cudaGetLastError = _Function(self._last_error)

    def _alloc(self, reference, size, flags):
        self.flags.append(flags)
        if self.alloc_code:
            return self.alloc_code
        block = ctypes.create_string_buffer(size)
        address = ctypes.addressof(block)
        ctypes.memset(address, 0xA5, size)  # NaN or nonsense in every type: who reads before he writes is seen
        self.blocks[address] = block
        reference._obj.value = address
        return 0

    def _free(self, address):
        self.freed += 1
        block = self.blocks.pop(address)
        ctypes.memset(address, 0x5A, len(block))
        return self.free_code

    def _set_device(self, device):
        self.devices.append(device)
        return self.device_code

    def _last_error(self):
        self.cleared += 1
        return 0

    def holds(self, array):
        """Whether the array's memory is of here."""
        start = array.__array_interface__["data"][0]
        return any(address <= start < address + len(block) for address, block in self.blocks.items())


@pytest.fixture(scope="session")
def fake_cuda():
    """CUDA's runtime made of ordinary memory, with a record of who asked for what: a class."""
    return FakeCuda
