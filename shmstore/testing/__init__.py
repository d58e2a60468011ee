"""The contract as a test suite, for our own stores and for anybody's.

    class TestMyStore(StoreContract):
        def make_store(self, **options):
            return MyStore(**options)

Needs pytest. The suite never asks which store it runs on, and uses nothing but the contract. Each test makes its own
store and closes it.

Its parts, each a class of its own: one session (`sessions`), how long it lives (`lives`), all of them (`crowds`), what
makes room (`limits`), what hears of it (`drops`), requests that overlap (`turns`), what a fault leaves (`faults`), the
store itself (`handles`).
"""

import pytest

_PARTS = ("base", "sessions", "lives", "crowds", "limits", "drops", "turns", "faults", "handles")

# Before they are imported: a failing assertion in them then shows what it compared.
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in _PARTS))

from shmstore.testing.base import wait_until
from shmstore.testing.collections import CrowdContract
from shmstore.testing.dispose import DropContract
from shmstore.testing.errors import FaultContract
from shmstore.testing.expiry import LifeContract
from shmstore.testing.handle import HandleContract
from shmstore.testing.limits import LimitContract
from shmstore.testing.locks import TurnContract
from shmstore.testing.sessions import SessionContract

__all__ = ["StoreContract", "wait_until"]


class StoreContract(
    SessionContract,
    LifeContract,
    CrowdContract,
    LimitContract,
    DropContract,
    TurnContract,
    FaultContract,
    HandleContract,
):
    """What every store keeps. Inherit it and say in `make_store` how to make one."""
