"""Page-locked memory, on a CUDA runtime made of ordinary memory: blocks, limits, failures, and who gives back when."""

from __future__ import annotations

import ctypes
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.signature import DTYPES
from fettle.runtime import _pinned as module
from fettle.runtime._pinned import CudaHost, PinnedMemory, find_library, pinned_memory

PAGE = 4096


def memory_of(cuda, **options):
    return PinnedMemory(CudaHost(cuda, 3), **options)


def test_arrays_are_in_memory_for_every_context_of_the_device_asked_for(fake_cuda):
    cuda = fake_cuda()
    array = memory_of(cuda).empty((2, 3), "float32")
    assert cuda.holds(array)
    assert (array.shape, array.dtype, array.flags.writeable, array.flags.c_contiguous) == (
        (2, 3),
        "float32",
        True,
        True,
    )
    assert cuda.flags == [1]
    assert cuda.devices == [3]


@given(
    dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(0, 5), max_size=4).map(tuple), seed=st.integers(0, 2**32)
)
def test_an_array_holds_what_is_written_into_it(dtype, shape, seed, fake_cuda):
    memory = memory_of(fake_cuda())
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, 8 * 625, np.uint8)
    values = raw.view(dtype)[: int(np.prod(shape))].reshape(shape)
    array = memory.hold(values)
    assert (array.shape, array.dtype) == (shape, dtype)
    assert array.tobytes() == values.tobytes()
    assert memory.hold(array) is array


def test_what_lies_here_in_one_piece_is_taken_as_it_is_and_all_else_is_copied(fake_cuda):
    cuda = fake_cuda()
    memory = memory_of(cuda)
    own = memory.empty((6, 4), "float32")
    own[...] = np.arange(24).reshape(6, 4)
    for part in (own, own[2:4], own[3:], own.reshape(4, 6), own[1:2][0]):
        assert memory.hold(part) is part
    for other in (own[:, 1:], own[::2], own.T, own[::-1], np.asfortranarray(own), own.copy(), own.astype(">f4")):
        held = memory.hold(other)
        assert held is not other
        assert cuda.holds(held)
        assert held.dtype.isnative
        assert np.array_equal(held, other)


def test_a_block_is_used_again_only_when_nothing_refers_to_it(fake_cuda):
    cuda = fake_cuda()
    memory = memory_of(cuda)
    first = memory.empty((100,), "float64")
    part = first[10:20].reshape(2, 5)[1:]
    part[...] = 7
    del first
    others = [memory.empty((100,), "float64") for _ in range(5)]
    for other in others:
        other[...] = 0
    assert (part == 7).all()
    assert len(cuda.blocks) == 6
    del part, other, others
    for _ in range(20):
        memory.empty((100,), "float64")
    assert len(cuda.blocks) == 6
    assert cuda.freed == 0


def test_memory_goes_with_the_last_of_its_arrays(fake_cuda):
    cuda = fake_cuda()
    memory = memory_of(cuda)
    kept = memory.empty((3,), "int64")
    memory.empty((5000,), "int64")
    del memory
    assert cuda.freed == 0
    kept[...] = 1
    assert kept.sum() == 3
    del kept
    assert (cuda.freed, cuda.blocks) == (2, {})


def test_beyond_the_limit_arrays_are_in_ordinary_memory(fake_cuda):
    cuda = fake_cuda()
    memory = memory_of(cuda, limit_bytes=4 * PAGE)
    held = [memory.empty((PAGE,), "uint8") for _ in range(4)]
    more = memory.empty((PAGE,), "uint8")
    huge = memory.empty((5 * PAGE,), "uint8")
    assert all(map(cuda.holds, held))
    assert not cuda.holds(more)
    assert not cuda.holds(huge)
    assert memory.locked_bytes == 4 * PAGE
    del held
    assert cuda.holds(memory.empty((PAGE,), "uint8"))


def test_what_was_needed_once_makes_room_for_what_is_needed_now(fake_cuda):
    cuda = fake_cuda()
    memory = memory_of(cuda, limit_bytes=4 * PAGE)
    memory.empty((4 * PAGE,), "uint8")
    assert memory.locked_bytes == 4 * PAGE
    assert cuda.holds(memory.empty((PAGE,), "uint8"))
    assert memory.locked_bytes == PAGE
    assert cuda.freed == 1


@pytest.mark.parametrize("codes", [{"alloc_code": 2}, {"device_code": 101}])
def test_where_cuda_refuses_memory_is_ordinary_and_that_is_told_once(codes, caplog, fake_cuda):
    cuda = fake_cuda(**codes)
    memory = memory_of(cuda)
    with caplog.at_level(logging.WARNING, "fettle.runtime"):
        for size in (10, 10, 10_000):
            array = memory.empty((size,), "float32")
            array[...] = 1
            assert array.sum() == size
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        f"CUDA's runtime gave error {next(iter(codes.values()))} for {PAGE} page-locked bytes"
    ]
    assert cuda.cleared == 1, "the error would be taken for that of the next kernel"
    assert len(cuda.devices) == 1
    assert memory.locked_bytes == 0


def test_without_the_library_memory_is_ordinary_and_that_is_told(monkeypatch, caplog):
    monkeypatch.setattr(module, "find_library", lambda: None)
    pinned_memory.cache_clear()
    with caplog.at_level(logging.WARNING, "fettle.runtime"):
        memory = pinned_memory(0)
        assert pinned_memory(0) is memory
        assert memory.empty((3,), "float32").shape == (3,)
    pinned_memory.cache_clear()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["found no libcudart.so"]


def test_a_block_that_cannot_be_freed_is_no_error(fake_cuda):
    cuda = fake_cuda(free_code=4)
    memory = memory_of(cuda, limit_bytes=2 * PAGE)
    memory.empty((2 * PAGE,), "uint8")
    assert cuda.holds(memory.empty((1,), "uint8"))
    assert cuda.cleared == 1


def test_objects_are_never_put_there(fake_cuda):
    cuda = fake_cuda()
    held = memory_of(cuda).hold(np.array(["a", None], object))
    assert held.tolist() == ["a", None]
    assert not cuda.blocks


def test_the_library_that_is_loaded_already_is_preferred(monkeypatch):
    """A second version of it in the process would have errors and devices of its own."""
    loaded, tried = {"libcudart.so.12"}, []

    def load(name, mode):
        no_load = bool(mode & module.os.RTLD_NOLOAD)
        tried.append((name, no_load))
        if name not in loaded and (no_load or name != "libcudart.so.13"):
            raise OSError(name)
        return name

    monkeypatch.setattr(module.ctypes, "CDLL", load)
    assert find_library() == "libcudart.so.12"
    loaded.clear()
    assert find_library() == "libcudart.so.13"
    assert tried[-1] == ("libcudart.so.13", False)


def test_a_machine_without_cuda_has_no_library(monkeypatch):
    monkeypatch.setattr(module, "_LIBRARIES", ("libcudart-that-nobody-has.so.99",))
    assert find_library() is None


@pytest.mark.skipif(find_library() is None, reason="needs CUDA's runtime library, which needs no GPU to be there")
def test_the_real_library_takes_the_calls():
    """Page-locked where there is a GPU; where there is none the library says so, and memory is ordinary."""
    memory = PinnedMemory(CudaHost(find_library(), 0))
    arrays = [memory.empty((1000,), "float32") for _ in range(3)]
    for array in arrays:
        array[...] = 1
    assert [array.sum() for array in arrays] == [1000] * 3


def test_types_of_arguments_are_set_on_a_real_function():
    """C's own, under the names of CUDA's: an address is never cut to 32 bits."""
    library = ctypes.CDLL(None)

    class Renamed:
        cudaHostAlloc, cudaFreeHost = library.posix_memalign, library.free
        cudaSetDevice, cudaGetLastError = library.abs, library.rand

    host = CudaHost(Renamed(), 0)
    address = host.allocate(64)  # posix_memalign: at a multiple of 64, as many bytes as the flags are worth, one
    assert address % 64 == 0
    ctypes.memset(address, 0, 1)


def test_several_threads_never_share_a_block(fake_cuda):
    cuda = fake_cuda()
    memory = memory_of(cuda, limit_bytes=16 * PAGE)
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        for turn in range(200):
            array = memory.empty((200 + 997 * (turn % 7),), "int64")
            array[...] = number
            if not (array == number).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert memory.locked_bytes <= 16 * PAGE
    assert memory.locked_bytes == sum(map(len, cuda.blocks.values()))
