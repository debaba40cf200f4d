"""Device events, where there is a device; a clear error where there is none."""

from __future__ import annotations

import pytest
import torch

from fettle.core.errors import UsageError
from fettle.evaluate.cuda_timing import CudaClock
from fettle.evaluate.latency import Latency, measure_latency


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(UsageError, match="needs a CUDA device"):
        CudaClock()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_see_the_work_and_not_only_its_launch() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    calls = {"large": lambda: a @ a, "small": lambda: a[:64, :64] @ a[:64, :64]}
    found = measure_latency(calls, batch=1, threads=1, rounds=10, clock=CudaClock())
    large, small = found["large"], found["small"]
    assert isinstance(large, Latency)
    assert isinstance(small, Latency)
    assert large.p50_ms > small.p50_ms > 0
