"""The kinds of store that implement the contract, and a function that creates one of each."""

from __future__ import annotations

import itertools
import os
from typing import Any, Final

from processes import Start

from shmstore import Store, connect
from shmstore.contract import AnyStore

PRIVATE: Final = "private"
IN_PLACE: Final = "in place"
THROUGH_THE_SERVER: Final = "through the server"
KINDS: Final = (PRIVATE, IN_PLACE, THROUGH_THE_SERVER)

_numbers = itertools.count()


def make_store(kind: str, manage: Start, **options: Any) -> AnyStore:
    """Return a new store of that kind; the caller closes it."""
    if kind == PRIVATE:
        return Store(**options)
    manager = manage(f"s{next(_numbers)}", **options)
    manager.start()
    return connect(f"shm://{os.path.dirname(manager.address)}", in_place=kind == IN_PLACE)
