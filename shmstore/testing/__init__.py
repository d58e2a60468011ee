"""
The contract as a test suite, for the stores of this package and for others::

    class TestMyStore(StoreContract):
        def make_store(self, **options):
            return MyStore(**options)

It needs pytest. The suite does not depend on the kind of store and uses only the contract. Each test creates its own
store and closes it.

Each part is a class in a module of its own: one session (``sessions``), ttl and expiry (``expiry``), all sessions, also
of one owner (``collections``), limits and eviction (``limits``), ``dispose``, tombstones and locks (``locks``), errors
(``errors``), the store itself (``handle``).
"""

import pytest

_PARTS = ("base", "sessions", "expiry", "collections", "limits", "dispose", "locks", "errors", "handle")

# Before the import of these modules, so that their failing assertions show the compared values.
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in _PARTS))

from shmstore.testing.base import wait_until
from shmstore.testing.collections import CollectionContract
from shmstore.testing.dispose import DisposeContract
from shmstore.testing.errors import ErrorContract
from shmstore.testing.expiry import ExpiryContract
from shmstore.testing.handle import HandleContract
from shmstore.testing.limits import LimitContract
from shmstore.testing.locks import LockContract
from shmstore.testing.sessions import SessionContract

__all__ = ["StoreContract", "wait_until"]


class StoreContract(
    SessionContract,
    ExpiryContract,
    CollectionContract,
    LimitContract,
    DisposeContract,
    LockContract,
    ErrorContract,
    HandleContract,
):
    """
    The contract of every store. Inherit from it, and implement ``make_store(self, **options)``: it returns a new, empty
    store with these options. The suite closes it.
    """
