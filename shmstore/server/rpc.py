"""What a client can call in a server: the store's own methods, and some of the server. All other calls are refused."""

from __future__ import annotations

from typing import Final

__all__ = ["SERVER", "SERVER_METHODS", "STORE", "STORE_METHODS"]

STORE: Final = "store"
STORE_METHODS: Final = frozenset({
    "get", "peek", "load", "set", "add", "replace", "update", "touch", "destroy", "rename", "__contains__",
    "destroy_if_empty", "take_stale", "drop_pending", "gone", "ids", "all", "length", "clear", "prune",
    "start_interval", "stop_interval", "owned_by", "destroy_owned", "stats", "ping",
})  # fmt: skip
SERVER: Final = "server"
SERVER_METHODS: Final = frozenset({"apply", "release", "repair", "shutdown"})
