"""The errors of shmstore. They are raised for faults only: a session that is not there is never an error."""

from __future__ import annotations

import traceback


class ShmStoreError(Exception):
    """Superclass of all shmstore errors. Never raised directly."""


class StoreUnavailable(ShmStoreError):
    """The store, or the server a call needs, cannot be reached."""


class StoreTimeout(StoreUnavailable):
    """The lock of the store was not free within ``lock_timeout``; the message names its holder."""

    def __init__(self, *args: object, waited: float = 0.0) -> None:
        super().__init__(*args)
        self.waited = waited  # seconds


class StoreFull(ShmStoreError):
    """The shared memory of a new store cannot be reserved. A running store is never full: it evicts."""


class RecordTooLarge(ShmStoreError):
    """A session is larger than ``max_session`` bytes. What was stored before is still there."""

    @classmethod
    def of(cls, size: int, limit: int) -> RecordTooLarge:
        """Return what there is to say of a session of so many bytes."""
        return cls(
            f"the session has {size} bytes, max_session allows {limit}: keep large things in a database and their ids "
            f"in the session, or raise max_session"
        )


class SerializationError(ShmStoreError):
    """A value cannot be turned into bytes; the message names its key and type. What was stored is still there."""


class SnapshotError(ShmStoreError):
    """A snapshot cannot be written, or is none that can be read. What was stored or saved before is still there."""


class ConfigError(ShmStoreError, ValueError):
    """An option, a store name or a URL is wrong; the message says what would be right."""


def outline(error: BaseException) -> str:
    """Return what an error is and where it was raised, for the log. Not its text: that may quote an id or a session."""
    return "".join([type(error).__name__, "\n", *traceback.format_tb(error.__traceback__)]).rstrip()
