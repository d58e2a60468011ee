"""The two engines in tests: the available ones, and tests that run on each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shmstore.engine import core

VARIABLE = "SHMSTORE_ENGINE"


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Open arenas on this engine, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        yield


def _built() -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        return core.engine() == "c"


BUILT = _built()
needs_core = pytest.mark.skipif(not BUILT, reason="the C core was not built")
on_each_engine = pytest.mark.parametrize(
    "chosen_engine", ["python", pytest.param("c", marks=needs_core)], indirect=True
)
"""Marks a test, or as `pytestmark` a module, that is run once on each engine."""

COMPILER = os.environ.get("CC", "cc")
