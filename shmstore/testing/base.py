"""What the parts of the contract share: a store for each test, and ways to wait, to race and to watch ``dispose``."""

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

SHORT = 0.05  # seconds: a life that a test waits for the end of

Make = Callable[..., Any]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def needs(*capabilities: Capability) -> Callable[[F], F]:
    """Mark a test of what only stores with these capabilities do; others skip it, and the reason says why."""

    def mark(test: F) -> F:
        vars(test)["needs"] = frozenset(capabilities)
        return test

    return mark


def can(store: Any, capability: Capability) -> bool:
    """Return whether a store has a capability; one that says nothing can do what a store in shared memory can."""
    return capability in getattr(store, "capabilities", IN_MEMORY)


class Base:
    """How the tests get their stores."""

    _lacking: ClassVar[dict[type, frozenset[Capability]]] = {}

    def make_store(self, **options: Any) -> Any:
        """Return a new, empty store with these options; the suite closes it."""
        raise NotImplementedError

    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Iterator[Make]:
        """A function that makes stores, exact in their order of use unless told otherwise."""
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
        """One store with nothing special about it."""
        return make()

    @pytest.fixture
    def disposals(self, tmp_path: Path) -> Disposals:
        """A ``dispose`` that writes down its calls; in a file, because it runs in the process that owns the store."""
        return Disposals(tmp_path / "disposals")


class Disposals:
    """The calls of a ``dispose``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gate = path.with_suffix(".gate")

    @property
    def dispose(self) -> Callable[[str, Any, str], None]:
        """The function; by value it goes to any process."""
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
        """Return the calls since the last time, and forget them."""
        calls = self.calls()
        self.path.unlink(missing_ok=True)
        return calls

    @contextmanager
    def held(self, sid: str, call: Callable[[], T]) -> Iterator[Callable[[], T]]:
        """
        Make a call that disposes of a session, and keep it inside ``dispose`` while the block runs.

        Yields:
            What returns the result of the call; to be called after the block.
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
    """Make a call in a thread while the block runs; yield what waits for its result."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call).result


def at_once(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Return what these calls return, made at the same time in a thread each."""
    calls = list(calls)
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        start.wait(60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def wait_until(condition: Callable[[], object], timeout: float = 60) -> None:
    """Wait for a condition instead of a time; fail if it does not come true within ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)
