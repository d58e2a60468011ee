"""Which version of shmstore this is, and which Python runs it: two that differ may be unable to work together."""

from __future__ import annotations

import sys
import zlib
from typing import Final

VERSION: Final = "0.1.0"  # the one in pyproject.toml
PYTHON = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"


def name() -> str:
    """Return both, for messages."""
    return f"shmstore {VERSION} on {PYTHON}"


def number() -> int:
    """Return a number of 32 bits, never 0, that another release or another Python does not have."""
    return zlib.crc32(name().encode()) or 1
