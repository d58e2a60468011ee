"""A plain manager: the standard library's way to share a dict between processes."""

from __future__ import annotations

import sys
import threading
import time
from multiprocessing.managers import BaseManager
from typing import Any

KEY = b"benchmark"


class Table:
    """Values by key, each with a deadline: the least that can hold sessions."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[float, Any]] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Any:
        deadline, value = self._values.get(key, (0.0, None))
        return value if deadline > time.monotonic() else None

    def set(self, key: str, value: Any, ttl: float) -> None:
        self._values[key] = time.monotonic() + ttl, value

    def touch(self, key: str, ttl: float) -> bool:
        with self._lock:
            if key not in self._values:
                return False
            self._values[key] = time.monotonic() + ttl, self._values[key][1]
            return True

    def update(self, key: str, changes: dict[str, Any]) -> bool:
        with self._lock:
            if key not in self._values:
                return False
            deadline, value = self._values[key]
            self._values[key] = deadline, value | changes
            return True

    def destroy(self, key: str) -> bool:
        return self._values.pop(key, None) is not None


_table = Table()


class Manager(BaseManager):
    """Its server."""


Manager.register("table", callable=lambda: _table)


def connect(address: str) -> Any:
    """Return a proxy of the table."""
    manager = Manager(address=address, authkey=KEY)
    manager.connect()
    return manager.table()  # type: ignore[attr-defined]


if __name__ == "__main__":
    Manager(address=sys.argv[1], authkey=KEY).get_server().serve_forever()
