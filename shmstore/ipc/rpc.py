"""What a client can call in a server, and how long a request may be. All other calls are refused."""

from __future__ import annotations

from typing import Final

from shmstore.engine.arena import Arena
from shmstore.engine.header import MAX_SESSION

__all__ = ["SERVER", "SERVER_METHODS", "STORE", "STORE_METHODS", "request_limit"]

STORE: Final = "store"
STORE_METHODS: Final = frozenset({
    "get", "peek", "load", "set", "add", "replace", "update", "touch", "destroy", "rename", "__contains__",
    "destroy_if_empty", "take_stale", "drop_pending", "gone", "ids", "all", "length", "clear", "prune",
    "start_interval", "stop_interval", "owned_by", "destroy_owned", "stats", "ping",
})  # fmt: skip
SERVER: Final = "server"
SERVER_METHODS: Final = frozenset({"apply", "release", "repair", "shutdown"})


def request_limit(arena: Arena) -> int:
    """Return how many bytes a request to the server may have: the largest session, pickled, and more."""
    return 2 * arena.file.cells[MAX_SESSION] + 65536
