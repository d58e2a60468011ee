"""Web sessions in shared memory for all workers of one host: LRU, TTL, and no other service to run."""

from typing import TYPE_CHECKING, Any

from shmstore.client.store_proxy import StoreProxy, connect
from shmstore.contract import KEEP
from shmstore.errors import (
    ConfigError,
    RecordTooLarge,
    SerializationError,
    ShmStoreError,
    SnapshotError,
    StoreFull,
    StoreTimeout,
    StoreUnavailable,
)
from shmstore.store.store import Store

if TYPE_CHECKING:
    from shmstore.manager import StoreManager
    from shmstore.redis import RedisStore

__all__ = [
    "KEEP",
    "ConfigError",
    "RecordTooLarge",
    "RedisStore",
    "SerializationError",
    "ShmStoreError",
    "SnapshotError",
    "Store",
    "StoreFull",
    "StoreManager",
    "StoreProxy",
    "StoreTimeout",
    "StoreUnavailable",
    "connect",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "StoreManager":  # imported on access, because it needs multiprocess, and that takes its time
        from shmstore.manager import StoreManager

        return StoreManager
    if name == "RedisStore":  # imported on access, because it needs the package redis
        from shmstore.redis import RedisStore

        return RedisStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
