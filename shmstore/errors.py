"""All exceptions of shmstore. They report faults only: a session that does not exist is not an error."""

from __future__ import annotations

import traceback


class ShmStoreError(Exception):
    """Superclass of all shmstore errors. Never raised directly."""


class StoreUnavailable(ShmStoreError):
    """The store, or the server that a call needs, cannot be reached."""


class StoreTimeout(StoreUnavailable):
    """
    The lock of the store was not free within ``lock_timeout``; the message names its holder.

    Attributes:
        waited: How long the caller waited, in seconds.
    """

    def __init__(self, *args: object, waited: float = 0.0) -> None:
        super().__init__(*args)
        self.waited = waited


class StoreFull(ShmStoreError):
    """The shared memory of a new store cannot be reserved. A running store is never full, because it evicts."""


class RecordTooLarge(ShmStoreError):
    """A session is larger than ``max_session`` bytes. The stored session is unchanged."""

    @classmethod
    def of(cls, size: int, limit: int) -> RecordTooLarge:
        """Return the error for a session of ``size`` bytes."""
        return cls(
            f"the session has {size} bytes, max_session allows {limit}: keep large data in a database and its id "
            f"in the session, or raise max_session"
        )


class SerializationError(ShmStoreError):
    """A value cannot be encoded; the message names its key and type. The stored session is unchanged."""


class SnapshotError(ShmStoreError):
    """A snapshot cannot be written or read. The stored sessions and the existing snapshot are unchanged."""


class ConfigError(ShmStoreError, ValueError):
    """An option, a store name or a URL is invalid; the message says what is valid."""


def safe_traceback(error: BaseException) -> str:
    """Return the type and the traceback of an error, for the log. Not its text, which may quote an id or a session."""
    return "".join([type(error).__name__, "\n", *traceback.format_tb(error.__traceback__)]).rstrip()
