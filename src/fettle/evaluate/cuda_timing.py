"""Timing on a CUDA device with events, which the device itself stamps: no launch queue, no host jitter."""

from __future__ import annotations

import torch

from fettle.core.errors import UsageError
from fettle.evaluate.latency import Call, HostClock


class CudaClock(HostClock):
    """Pass as `measure_latency(..., clock=CudaClock())`: the time a call keeps the device busy.

    A host clock around a CUDA call would time only the launch. Two events are recorded on the current stream around
    the call; after the second is reached their distance is read (resolution about half a microsecond). Work that a
    call puts on other streams is not seen. Raises UsageError where torch sees no CUDA device.
    """

    def __init__(self) -> None:
        super().__init__()
        if not torch.cuda.is_available():
            raise UsageError("timing with device events needs a CUDA device that torch sees, got none: use HostClock")

    def time_ns(self, call: Call) -> int:
        """Nanoseconds between the two events."""
        # Otherwise work queued before would run inside the first call's time.
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return round(float(start.elapsed_time(end)) * 1e6)
