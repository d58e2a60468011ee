"""Durations and sizes, for people to read."""

from __future__ import annotations

import math
import re

_UNITS = (("d", 86400), ("h", 3600), ("m", 60))
_FACTORS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


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


def parse_size(text: str) -> int:
    """
    Return a number of bytes from text: ``67108864``, ``64M``, ``2GiB``.

    Raises:
        ValueError: It is not one; the message says what would be right.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15})\s*([KMG]?)(?:iB|B)?\s*", text, re.ASCII | re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r} is not a whole number of bytes, such as 67108864, 64M, 2G")
    return int(found[1]) * _FACTORS[found[2].upper()]
