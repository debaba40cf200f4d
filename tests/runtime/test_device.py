"""The device is the one asked for, or an error says what is missing: never another one in silence."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from fettle.core.errors import UsageError
from fettle.runtime import eager, onnxruntime
from fettle.runtime._device import gpu_number, wanted_device
from fettle.runtime._onnx_bound import Bound
from fettle.runtime._pinned import CudaHost, PinnedMemory, find_library
from fettle.runtime.eager import Eager
from fettle.runtime.onnxruntime import OnnxRuntime
from fettle.testing import runtimes
from fettle.testing.runtimes import seal

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU that torch sees")


def cuda_devices():
    """How many GPUs ONNX Runtime could use: its build for CUDA may be there without a driver."""
    if "CUDAExecutionProvider" not in onnxruntime.onnxruntime.get_available_providers():
        return 0
    onnxruntime.onnxruntime.preload_dlls()
    library, count = find_library(), ctypes.c_int()
    return count.value if library is not None and library.cudaGetDeviceCount(ctypes.byref(count)) == 0 else 0


needs_gpu_build = pytest.mark.skipif(cuda_devices() == 0, reason="needs a GPU and onnxruntime-gpu")


@pytest.mark.parametrize(("value", "number"), [("", None), ("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:12", 12)])
def test_a_device_is_read(value, number, monkeypatch):
    monkeypatch.setenv("FETTLE_DEVICE", value)
    assert gpu_number(wanted_device()) == number


@pytest.mark.parametrize("value", ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto", "cuda:1 ", "cuda:1\n"])
def test_anything_else_is_refused(value, monkeypatch):
    monkeypatch.setenv("FETTLE_DEVICE", value)
    with pytest.raises(UsageError, match='FETTLE_DEVICE must be "cpu", "cuda" or like "cuda:1"'):
        wanted_device()


def test_without_the_variable_it_is_the_cpu(monkeypatch):
    monkeypatch.delenv("FETTLE_DEVICE", raising=False)
    assert wanted_device() == "cpu"


def test_a_gpu_that_torch_does_not_see_is_refused(eager_mlp, monkeypatch):
    monkeypatch.setenv("FETTLE_DEVICE", "cuda:99")
    with pytest.raises(UsageError, match="asks for cuda:99, and torch sees"):
        Eager().load(seal(*eager_mlp), threads=1)


def test_a_build_of_onnx_runtime_without_cuda_is_told(onnx_mlp, monkeypatch):
    monkeypatch.setenv("FETTLE_DEVICE", "cuda")
    monkeypatch.setattr(onnxruntime.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="pip install onnxruntime-gpu"):
        OnnxRuntime().load(seal(*onnx_mlp), threads=1)


def test_onnx_runtime_falling_back_to_the_cpu_is_told(onnx_mlp, monkeypatch):
    """It does so with a warning where CUDA's libraries are not found."""
    session = onnxruntime.onnxruntime.InferenceSession
    monkeypatch.setenv("FETTLE_DEVICE", "cuda")
    monkeypatch.setattr(onnxruntime.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime.onnxruntime,
        "InferenceSession",
        lambda path, options, providers: session(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(UsageError, match="ONNX Runtime cannot use it"):
        OnnxRuntime().load(seal(*onnx_mlp), threads=1)


def test_precisions_follow_the_device(monkeypatch):
    monkeypatch.delenv("FETTLE_DEVICE", raising=False)
    assert "fp16" not in OnnxRuntime.precisions | Eager.precisions
    monkeypatch.setattr(eager.torch.cpu, "get_capabilities", dict)
    assert Eager.precisions == {"float"}
    monkeypatch.setattr(eager.torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert Eager.precisions == {"float", "bf16"}
    monkeypatch.setenv("FETTLE_DEVICE", "cuda")
    monkeypatch.setattr(eager.torch.cuda, "is_available", lambda: False)
    assert Eager.precisions == {"float"}
    monkeypatch.setattr(onnxruntime.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert "fp16" in OnnxRuntime.precisions


@needs_gpu
@pytest.mark.parametrize("check", [runtimes.agrees_with_torch, runtimes.agrees_in_integers], ids=lambda c: c.__name__)
def test_eager_conforms_on_a_gpu(check, tmp_path, monkeypatch):
    monkeypatch.setenv("FETTLE_DEVICE", "cuda")
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    check(Eager(), tmp_path)


@needs_gpu_build
@pytest.mark.parametrize("check", [runtimes.answers_several_threads, runtimes.agrees_in_integers, runtimes.takes_views])
def test_onnx_runtime_conforms_on_a_gpu(check, tmp_path, monkeypatch):
    monkeypatch.setenv("FETTLE_DEVICE", "cuda")
    check(OnnxRuntime(), tmp_path)


@needs_gpu_build
def test_onnx_runtime_answers_from_page_locked_memory_as_from_any_other_on_a_gpu(exported, monkeypatch):
    monkeypatch.setenv("FETTLE_DEVICE", "cuda")
    runner = OnnxRuntime().load(seal(*exported(OnnxRuntime, "two_outputs")), threads=1)
    assert isinstance(runner, Bound)
    for rows in (1, 2, 7, 32, 1, 300, 5):
        x = np.random.default_rng(rows).normal(size=(rows, 3, 8, 8)).astype(np.float32)
        found = runner.run({"input_9": x})
        for array, want in zip(found.values(), runner._session.run(list(found), {"input_9": x}), strict=True):
            assert array.shape == want.shape
            assert np.allclose(array, want, atol=1e-6)
    assert runner._binds
    assert runner._memory.locked_bytes > 0


@needs_gpu_build
def test_memory_is_really_page_locked_on_a_gpu():
    library = find_library()
    array = PinnedMemory(CudaHost(library, 0)).empty((1000,), "float32")
    attributes = ctypes.create_string_buffer(256)  # of CUDA's cudaPointerAttributes, which begins with the type
    address = ctypes.c_void_p(array.ctypes.data)
    assert library.cudaPointerGetAttributes(attributes, address) == 0
    assert ctypes.c_int.from_buffer(attributes).value == 1, "cudaMemoryTypeHost"
