"""Numbers as people read them: three significant digits and a unit."""

from __future__ import annotations

import math

from fettle.core.report import Measurement


def format_ms(value: float) -> str:
    """Milliseconds, or microseconds and seconds where those read better.

    >>> format_ms(0.0421), format_ms(0.165), format_ms(12.345), format_ms(80241.0)
    ('42.1 µs', '0.165 ms', '12.3 ms', '80.2 s')
    """
    if not math.isfinite(value):
        return str(value)
    if 0 < value < 0.1:
        return f"{_three(value * 1e3)} µs"
    return f"{_three(value)} ms" if value < 10_000 else f"{_three(value / 1e3)} s"


def format_bytes(value: float) -> str:
    """Bytes in powers of 1000, as disks are sold and files listed.

    >>> format_bytes(512), format_bytes(1_204_000), format_bytes(98_000_000)
    ('512 B', '1.20 MB', '98.0 MB')
    """
    if abs(value) < 1000:
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if abs(value) < 999.5:
            return f"{_three(value)} {unit}"
    return f"{_three(value / 1000)} TB"


def format_ratio(value: float) -> str:
    """A speed-up or saving.

    >>> format_ratio(2.9), format_ratio(0.5), format_ratio(math.inf)
    ('2.90×', '0.50×', '∞×')
    """
    if math.isinf(value):
        return "∞×"
    return f"{value:.2f}×" if value < 100 else f"{value:.0f}×"


def format_value(value: float, unit: str = "") -> str:
    """A measurement's value with its unit.

    >>> format_value(0.88344), format_value(3.0, "threads"), format_value(1.0, "rows"), format_value(1500.0, "bytes")
    ('0.8834', '3 threads', '1 row', '1.50 kB')
    """
    if unit == "ms":
        return format_ms(value) if value >= 0 else f"-{format_ms(-value)}"
    if unit == "bytes":
        return format_bytes(value)
    if float(value).is_integer() and (unit or abs(value) > 1):
        text = f"{value:.0f}"
        unit = unit.removesuffix("s") if value == 1 else unit
    elif value != 0 and (abs(value) < 5e-5 or abs(value) >= 1e5):
        text = f"{value:.2e}"
    else:
        text = f"{value:.4f}"
    return f"{text} {unit}".rstrip()


def format_interval(measurement: Measurement) -> str:
    """Its interval, "" where it has none.

    >>> format_interval(Measurement(name="metric.accuracy", value=0.9, low=0.85, high=0.93))
    '0.8500 to 0.9300'
    """
    if measurement.low is None or measurement.high is None:
        return ""
    return f"{format_value(measurement.low, measurement.unit)} to {format_value(measurement.high, measurement.unit)}"


def _three(value: float) -> str:
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"
