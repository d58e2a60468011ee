"""The store of a server, for another process of the same user, which works on its memory in place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from shmstore import urls
from shmstore.client import connection
from shmstore.client.attachment import Attachment
from shmstore.client.proxy_base import ProxyBase
from shmstore.contract import KEEP, AnyStore, Data, Loaded, NewOwner, Owner, Stats
from shmstore.errors import ConfigError
from shmstore.ipc.directory import StoreFiles, lacking
from shmstore.options import Duration
from shmstore.store import private
from shmstore.store.trace import traced

__all__ = ["StoreProxy", "connect", "redis_store"]


class StoreProxy(ProxyBase):
    """
    A store that a server owns, used in place. It implements `AnyStore`.

    `connect` and `StoreManager.store` return it. Reads take no lock, writes take a short one, and neither waits for the
    server. Calls that need the server, `prune`, `start_interval`, `stop_interval`, `ping` and those that call a
    ``dispose``, wait for its answer, also while it is being restarted.

    A proxy may be shared by threads and greenlets, is inherited by fork, and can be pickled: it connects again.
    """

    _in_place = True

    def __init__(self, attachment: Attachment, manager: Any = None) -> None:
        self._attachment = attachment
        self._store = attachment.store
        self._manager = manager  # it lives as long as this
        attachment.hold()

    def get(self, sid: str) -> dict[Any, Any] | None:
        return self._store.get(sid)

    def peek(self, sid: str) -> dict[Any, Any] | None:
        return self._store.peek(sid)

    def load(self, sid: str) -> Loaded | None:
        return self._store.load(sid)

    def set(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> None:
        self._store.set(sid, session, ttl, owner)

    def add(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> bool:
        return self._store.add(sid, session, ttl, owner)

    def replace(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> bool:
        return self._store.replace(sid, session, ttl, owner)

    def update(
        self,
        sid: str,
        set: Mapping[Any, Any] = {},
        delete: Iterable[Any] = (),
        ttl: Duration | None = None,
        owner: NewOwner = KEEP,
    ) -> bool:
        return self._store.update(sid, set, delete, ttl, owner)

    def rename(
        self,
        old: str,
        new: str,
        set: Mapping[Any, Any] = {},
        delete: Iterable[Any] = (),
        ttl: Duration | None = None,
        owner: NewOwner = KEEP,
        tombstone: bool = False,
    ) -> bool:
        return self._store.rename(old, new, set, delete, ttl, owner, tombstone)

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
        return self._store.swap(sid, loaded, payload, ttl, owner, new, tombstone)

    def touch(self, sid: str, session: Mapping[Any, Any] | None = None, ttl: Duration | None = None) -> bool:
        return self._store.touch(sid, session, ttl)

    def destroy(self, sid: str | Iterable[str], tombstone: bool = False) -> int:
        return self._store.destroy(sid, tombstone)

    def destroy_if_empty(self, sid: str, ignore: Iterable[str] = (), tombstone: bool = False) -> bool:
        return self._store.destroy_if_empty(sid, ignore, tombstone)

    def gone(self, sid: str, within: Duration = 30.0, renamed: bool = False) -> bool:
        return self._store.gone(sid, within, renamed)

    def __contains__(self, sid: object) -> bool:
        return sid in self._store

    def ids(self) -> list[str]:
        return self._store.ids()

    def all(self) -> dict[str, dict[Any, Any]]:
        return self._store.all()

    def length(self, live: bool = False) -> int:
        return self._store.length(live)

    def clear(self) -> None:
        self._store.clear()

    def owned_by(self, owner: str) -> list[str]:
        return self._store.owned_by(owner)

    def destroy_owned(self, owner: str, keep: Iterable[str] = ()) -> int:
        return self._store.destroy_owned(owner, keep)

    def stats(self) -> Stats:
        return self._store.stats()

    # -- in the server -----------------------------------------------------------------------------------------------

    @traced
    def prune(self) -> int:
        pruned: int = self._attachment.call_store("prune")
        return pruned

    @traced
    def start_interval(self, period: Duration | None = None) -> None:
        self._attachment.call_store("start_interval", period=period)

    @traced
    def stop_interval(self) -> None:
        self._attachment.call_store("stop_interval")

    def ping(self) -> bool:
        answered: bool = self._attachment.call_store("ping")
        return answered


def connect(name_or_url: str, *, directory: str | os.PathLike[str] | None = None, in_place: bool = True) -> AnyStore:
    """
    Attach to a running store, from any process of the same user. Never starts a server.

    Args:
        name_or_url: ``"shop"``, ``"shm://shop"``, ``"shm:///path/to/store-directory"``. For the URL of a Redis or
            Valkey server, ``"redis://host"``, it returns a `shmstore.RedisStore`, which connects when it is used.
        directory: Where stores given by their names lie; None: ``/dev/shm/shmstore-<uid>``.
        in_place: Return a `StoreProxy`, which works on the shared memory itself. False: let the server carry out every
            method, a debugging aid.

    Raises:
        StoreUnavailable: The store does not exist, its server does not run, or its directory is not safe to use; or
            processes cannot share stores on this platform, and this process has no store of that name.
        ConfigError: The name or URL is not valid.
    """
    if urls.is_network(name_or_url):
        if directory is not None:
            raise ConfigError("a server's URL says where the store is; leave out directory")
        return redis_store(name_or_url)
    location = urls.parse(name_or_url, directory)
    if why := lacking(default=location.directory is None):
        return private.connect(location, why)
    files = StoreFiles.of(*location)
    store: AnyStore
    if in_place:
        store = StoreProxy.attach(files)
    else:
        from shmstore.client.remote_proxy import RemoteProxy  # only now: with dill it takes long to import

        store = RemoteProxy.attach(files)
    connection.warn_of_other_users(files)
    return store


def redis_store(url: str, options: Mapping[str, Any] = {}) -> AnyStore:
    """Return the store on a Redis or Valkey server; imported only here, as it needs a package of its own."""
    from shmstore.redis import RedisStore

    return RedisStore.from_url(url, **options)
