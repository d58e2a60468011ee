"""
The cases of long proofs that `make test` runs: some, chosen at random. `make faults` runs all.

The choice is the same in all processes of a run: those of pytest-xdist must collect the same tests. The header of the
run prints its seed; SHMSTORE_SAMPLE=N repeats it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
Test = TypeVar("Test", bound=Callable[..., Any])

FULL = os.environ.get("SHMSTORE_FULL") == "1"
LONGEST = 3600 if FULL else 1100  # seconds to wait for a process with a long proof; pytest's limit is 100 more
SEED = os.environ.setdefault("SHMSTORE_SAMPLE", str(random.SystemRandom().randrange(10**6)))  # children inherit it


def sample(cases: Iterable[T], count: int, of: str) -> list[T]:
    """Return some of the cases in their order; in the full version, all. ``of`` names their subject."""
    found = [*cases]
    if FULL or count >= len(found):
        return found
    chosen = random.Random(f"{SEED} {of}").sample(range(len(found)), count)
    return [found[number] for number in sorted(chosen)]


def some(name: str, cases: dict[str, Any], count: int = 1) -> Callable[[Test], Test]:
    """Return a decorator like `pytest.mark.parametrize`, with cases by their ids, of which it takes some."""

    def decorate(test: Test) -> Test:
        chosen = sample(cases, count, f"{test.__module__} {test.__qualname__}")
        decorated: Test = pytest.mark.parametrize(name, [cases[each] for each in chosen], ids=chosen)(test)
        return decorated

    return decorate
