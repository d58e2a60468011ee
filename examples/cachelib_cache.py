"""
A cache for what is written for cachelib, Flask-Caching for example: `StoreCache(shmstore.connect("cache"))`.

Give it a store of its own. All processes share what it holds, and the least recently used entries are evicted.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any

from cachelib import BaseCache

from shmstore.contract import AnyStore


class StoreCache(BaseCache):
    """A cache whose entries are the sessions of a store. It holds what a session can hold, and never a pickle."""

    def __init__(self, store: AnyStore, default_timeout: Any = 300, **options: Any) -> None:
        super().__init__(default_timeout, **options)
        self._store = store

    def get(self, key: str) -> Any:
        found = self._store.get(_id(key))
        return None if found is None else found.get("value")

    def set(self, key: str, value: Any, timeout: Any = None) -> bool:
        self._store.set(_id(key), {"value": value}, ttl=self._life(timeout))
        return True

    def add(self, key: str, value: Any, timeout: Any = None) -> bool:
        return self._store.add(_id(key), {"value": value}, ttl=self._life(timeout))

    def delete(self, key: str) -> bool:
        return self._store.destroy(_id(key)) == 1

    def has(self, key: str) -> bool:
        return _id(key) in self._store

    def clear(self) -> bool:
        self._store.clear()
        return True

    def inc(self, key: str, delta: int = 1) -> int | None:
        with self._store.lock(_id(key)):
            return super().inc(key, delta)

    def dec(self, key: str, delta: int = 1) -> int | None:
        return self.inc(key, -delta)

    def _life(self, timeout: Any) -> float:
        return self._normalize_timeout(timeout) or math.inf


def _id(key: str) -> str:
    return "cache:" + (key if len(key) <= 50 else blake2b(key.encode(), digest_size=32).hexdigest())
