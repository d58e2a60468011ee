"""The store of a server, for another process of the same user, by messages: the plain proxy of a manager."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from shmstore.client.attachment import Attachment
from shmstore.client.proxy_base import ProxyBase
from shmstore.contract import KEEP, Loaded, NewOwner
from shmstore.engine.header import BY_FUNCTION, TTL
from shmstore.ipc.rpc import STORE, STORE_METHODS
from shmstore.options import Duration
from shmstore.store.store import Store
from shmstore.store.trace import traced
from shmstore.system.import_dill import managers

__all__ = ["RemoteProxy"]

P = ParamSpec("P")
R = TypeVar("R")


def _in_server(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Return a method that calls this one of the server's store."""
    signature = inspect.signature(method)

    @wraps(method)
    def call(self: RemoteProxy, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(self, *args, **kwargs).arguments
        del given["self"]
        result: R = self._callmethod(method.__name__, (), given)
        return result

    return traced(call)


class RemoteProxy(ProxyBase, managers.BaseProxy):  # type: ignore[misc] # multiprocess has no types
    """
    A store in a server, with every method carried out there: the plain proxy of a manager, a debugging aid.

    A call waits for its answer as long as the heart of the server beats, and as long for a server that is being
    restarted; see `Attachment.call_store`. Every method may raise `StoreUnavailable` when that ends. After a
    `StoreUnavailable` of `add`, `rename` and `clear` they may have been carried out or not.
    """

    _exposed_ = tuple(sorted(STORE_METHODS))
    _in_place = False

    def __init__(self, attachment: Attachment, manager: Any = None) -> None:
        # No references are counted and no key is exchanged: the socket is in a directory that only this user can enter.
        token = managers.Token("Store", attachment.files.address, STORE)
        managers.BaseProxy.__init__(self, token, "pickle", manager, authkey=b"", incref=False)
        self._attachment = attachment
        try:
            self.ping()
        except BaseException:
            self.close()
            raise

    get = _in_server(Store.get)
    peek = _in_server(Store.peek)
    load = _in_server(Store.load)
    set = _in_server(Store.set)
    add = _in_server(Store.add)
    replace = _in_server(Store.replace)
    update = _in_server(Store.update)
    rename = _in_server(Store.rename)
    _touch = _in_server(Store.touch)
    destroy = _in_server(Store.destroy)
    destroy_if_empty = _in_server(Store.destroy_if_empty)
    gone = _in_server(Store.gone)
    __contains__ = _in_server(Store.__contains__)
    ids = _in_server(Store.ids)
    all = _in_server(Store.all)
    length = _in_server(Store.length)
    clear = _in_server(Store.clear)
    prune = _in_server(Store.prune)
    start_interval = _in_server(Store.start_interval)
    stop_interval = _in_server(Store.stop_interval)
    owned_by = _in_server(Store.owned_by)
    destroy_owned = _in_server(Store.destroy_owned)
    stats = _in_server(Store.stats)
    ping = _in_server(Store.ping)

    def touch(self, sid: str, session: Mapping[Any, Any] | None = None, ttl: Duration | None = None) -> bool:
        seen = session
        if session is None and ttl is None and self.arena.cells[TTL] == BY_FUNCTION:
            seen = self.peek(sid)
        if isinstance(seen, Mapping) and ttl is None:
            ttl = self._attachment.store.life_of(seen, sid)
        if isinstance(session, Mapping):  # nothing else of it is stored
            session = {"cookie": session["cookie"]} if "cookie" in session else None
        return self._touch(sid, session, ttl)

    def swap(
        self,
        sid: str,
        loaded: Loaded,
        payload: bytes,
        ttl: Duration | None = None,
        owner: NewOwner = KEEP,
        new: str | None = None,
        tombstone: bool = False,
    ) -> bool:
        """Return False: a session that the server has loaded comes without its handle."""
        return False

    def _callmethod(self, methodname: str, args: Any = (), kwds: Any = {}) -> Any:  # noqa: B006
        """Call a method of the store in the server."""
        return self._attachment.call_store(methodname, *args, **kwds)

    def _incref(self) -> None:
        """Do nothing: the store lives as long as its server."""
