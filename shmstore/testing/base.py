"""Shared by the parts of the contract: a store for each test, waiting, concurrency, and a recorder of ``dispose``."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from shmstore.contract import IN_MEMORY, Capability

__all__ = ["SHORT", "Base", "Disposals", "Make", "at_once", "can", "in_background", "needs", "wait_until"]

SHORT = 0.05  # seconds: a ttl whose end a test waits for

Make = Callable[..., Any]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def needs(*capabilities: Capability) -> Callable[[F], F]:
    """Mark a test that needs these capabilities. Other stores skip it, with the reason."""

    def mark(test: F) -> F:
        vars(test)["needs"] = frozenset(capabilities)
        return test

    return mark


def can(store: Any, capability: Capability) -> bool:
    """Return whether a store has a capability. Without `capabilities` it has those of a store in shared memory."""
    return capability in getattr(store, "capabilities", IN_MEMORY)


class Base:
    """Fixtures that create the stores of the tests."""

    _lacking: ClassVar[dict[type, frozenset[Capability]]] = {}

    def make_store(self, **options: Any) -> Any:
        """Return a new, empty store with these options. The suite closes it."""
        raise NotImplementedError

    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Iterator[Make]:
        """A function that creates stores, by default with an exact order of use (``recency=0``)."""
        stores = []

        def make(**options: Any) -> Any:
            stores.append(self.make_store(**{"memory": 2**18, "recency": 0, "check_period": None} | options))
            return stores[-1]

        needed: frozenset[Capability] = getattr(request.function, "needs", frozenset())
        if needed:
            if type(self) not in self._lacking:
                store = make()
                self._lacking[type(self)] = frozenset(each for each in Capability if not can(store, each))
            if missing := sorted(needed & self._lacking[type(self)]):
                for store in stores:
                    store.close()
                why = "; ".join(f"{each.name}: {each}" for each in missing)
                pytest.skip(f"not promised by this store: {why}")
        yield make
        for store in stores:
            store.close()

    @pytest.fixture
    def store(self, make: Make) -> Any:
        """A store with default options."""
        return make()

    @pytest.fixture
    def disposals(self, tmp_path: Path) -> Disposals:
        """A ``dispose`` that records its calls, in a file, because it runs in the process that owns the store."""
        return Disposals(tmp_path / "disposals")


class Disposals:
    """Records the calls of a ``dispose``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gate = path.with_suffix(".gate")

    @property
    def dispose(self) -> Callable[[str, Any, str], None]:
        """The function. It is pickled by value, so it runs in any process."""
        path, gate = str(self.path), str(self.gate)

        def dispose(sid: str, session: Any, reason: str) -> None:
            import json
            import os
            import time

            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps([sid, session, reason]) + "\n")
            end = time.monotonic() + 60
            while os.path.exists(f"{gate} {sid}") and time.monotonic() < end:
                time.sleep(0.002)

        return dispose

    def calls(self) -> list[list[Any]]:
        """Return the calls since the last `take`."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def take(self) -> list[list[Any]]:
        """Return the calls since the last `take`, and remove them from the record."""
        calls = self.calls()
        self.path.unlink(missing_ok=True)
        return calls

    @contextmanager
    def held(self, sid: str, call: Callable[[], T]) -> Iterator[Callable[[], T]]:
        """
        Make a call that disposes of a session, and block it inside ``dispose`` while the block runs.

        Yields:
            A function that returns the result of the call, to be called after the block.
        """
        gate = Path(f"{self.gate} {sid}")
        gate.touch()
        try:
            with in_background(call) as result:
                try:
                    wait_until(lambda: any(called == sid for called, _, _ in self.calls()))
                    yield result
                finally:
                    gate.unlink()
        finally:
            gate.unlink(missing_ok=True)


@contextmanager
def in_background(call: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Make a call in a thread while the block runs; yield a function that waits for its result."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call).result


def at_once(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Make calls at the same time, each in a thread, and return their results."""
    calls = list(calls)
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        start.wait(60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def wait_until(condition: Callable[[], object], timeout: float = 60) -> None:
    """Wait until a condition is true; fail if it is not within ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)
