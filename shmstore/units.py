"""Durations and sizes, for people to read."""

from __future__ import annotations

import math

_UNITS = (("d", 86400), ("h", 3600), ("m", 60))


def span(seconds: float) -> str:
    """Return a duration for people: ``42s``, ``1.5h``, ``never`` ends."""
    if math.isinf(seconds):
        return "never"
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.1f}{unit}" if seconds < 100 * size else f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
