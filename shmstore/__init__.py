"""Web sessions in shared memory for all workers of one host: LRU, TTL, and no other service to run."""

import sys

if sys.platform != "linux":
    raise ImportError(
        f"shmstore needs Linux (robust mutexes, CLOCK_BOOTTIME, tmpfs), not {sys.platform}; "
        f"on other systems develop in a container or a virtual machine"
    )

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
from shmstore.manager import StoreManager, StoreProxy, connect
from shmstore.store import KEEP, Store
from shmstore.trace import obey_environment

__all__ = [
    "KEEP",
    "ConfigError",
    "RecordTooLarge",
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

obey_environment()
