"""The version of shmstore and of the Python that runs it. Processes that differ in either may be incompatible."""

from __future__ import annotations

import sys
import zlib
from typing import Final

VERSION: Final = "0.1.0"  # equal to the version in pyproject.toml
PYTHON = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"


def describe() -> str:
    """Return both versions, for messages."""
    return f"shmstore {VERSION} on {PYTHON}"


def fingerprint() -> int:
    """Return a 32-bit number, never 0, that differs between releases of shmstore and between Python versions."""
    return zlib.crc32(describe().encode()) or 1
