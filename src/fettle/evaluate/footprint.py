"""How much disk and how much memory a model takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fettle.core.artifact import Artifact
from fettle.core.errors import UsageError
from fettle.core.report import Measurement

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def measure_size(artifact: Artifact) -> Measurement:
    """What a deployment of the artifact must carry: "size", in bytes, without its golden and reference tensors."""
    return Measurement(name="size", value=float(artifact.size_bytes), unit="bytes", direction="lower", n=1)


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files under a folder. Links count as nothing: what they name lies elsewhere.

    Raises UsageError where there is no such file or folder.
    """
    if not path.exists():
        raise UsageError(f"a size needs a file or a folder, got {path}, which does not exist")
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())


def measure_peak_memory(call: Callable[[], object]) -> Measurement | None:
    """By how much the process's resident memory rises, at most, while `call` runs: "memory.peak", in bytes.

    Linux keeps the peak (VmHWM) and lets a process reset it; None where that cannot be done. Memory that the
    process freed earlier and kept is not counted when it is used again, so load the model inside `call`, in a
    process that did nothing large before.
    """
    try:
        _CLEAR.write_text(_RESET_PEAK)
        before = _resident_bytes("VmHWM")
    except OSError:
        return None
    call()
    peak = max(0, _resident_bytes("VmHWM") - before)
    return Measurement(name="memory.peak", value=float(peak), unit="bytes", direction="lower", n=1)


def _resident_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
