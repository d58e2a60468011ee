"""The stores of Flask, Django, ASGI and Gunicorn: one proxy per store and process, with its server if none runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

from shmstore import urls
from shmstore.client import connection
from shmstore.client.store_proxy import StoreProxy, redis_store
from shmstore.contract import AnyStore
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.errors import StoreUnavailable
from shmstore.ipc.channel import Unresponsive
from shmstore.ipc.directory import StoreFiles, checked, lacking
from shmstore.ipc.handshake import ConnectionLimitReached

if TYPE_CHECKING:
    from shmstore.manager import StoreManager

__all__ = ["attach_or_start", "detach"]

log = logging.getLogger("shmstore")

# Options by the location of their store, from Gunicorn's configuration file: Gunicorn executes it before it imports the
# application, and again at each HUP. They are not kept by path, because the default directory depends on the user: with
# --user, root reads the file, and another user serves the requests.
_registered: dict[urls.Location, dict[str, Any]] = {}
_attached: dict[str, StoreProxy] = {}
_on_servers: list[tuple[str, dict[str, Any], AnyStore]] = []  # URL, options
_users: WeakKeyDictionary[AnyStore, WeakSet[object]] = WeakKeyDictionary()
_attaching = GreenletLock()  # guards all of them


class _Process:
    """The user of the stores that stay open until the process ends."""


_PROCESS: Final = _Process()


def register(name: str, options: Mapping[str, Any]) -> None:
    """Set the options that `attach_or_start` uses in this process for the store of this name."""
    _registered[_location(name, options)] = dict(options)


def _location(name: str, options: Mapping[str, Any]) -> urls.Location:
    directory = options.get("directory")
    found = urls.parse(name, directory)
    return found if found.directory is None else found._replace(directory=os.path.abspath(found.directory))


def _url(place: urls.Location) -> str:
    return f"shm://{place.name}" if place.directory is None else f"shm://{os.path.join(place.directory, place.name)}"


def check(url: str, options: Mapping[str, Any]) -> None:
    """
    Check what is going to be given to `attach_or_start`. Nothing is opened.

    Raises:
        ConfigError: The URL or an option is invalid; the message says what is valid.
    """
    if urls.is_network(url):
        redis_store(url, options).close()  # it has connected to nothing
    else:
        checked(url, options)


def attach_or_start(url: str, options: Mapping[str, Any] | None = None, user: object = _PROCESS) -> AnyStore:
    """
    Return the proxy of a store, the same object at each call in a process; start the server if it does not run.

    A proxy created before a fork works in the children too: they inherit the memory, and open their own connections.
    After a change of user, the process gets the store of its new user.

    Args:
        url: Name or URL of the store. For the URL of a Redis or Valkey server no server is started.
        options: The options of `Options`. They override the options of a running server. None or empty: the options
            that Gunicorn's hooks have registered, or the defaults.
        user: The object for which `detach` is going to be called. By default the store stays open until the process
            ends.

    Raises:
        ConfigError, StoreFull, StoreUnavailable: As `StoreManager.start`.
    """
    if urls.is_network(url):
        return _on_network(url, options or {}, user)
    place = _location(url, options or {})
    if not options and place not in _registered and place.directory is None:
        # The hooks were given a directory, and the application only the name.
        place = next((each for each in _registered if each.name == place.name), place)
    given = dict(options or _registered.get(place, {}))
    given.pop("directory", None)
    path = StoreFiles.of(*place).path
    ticket = _attaching.ticket()
    try:
        ticket.acquire()
        store = _attached.get(path)
        if store is None or store.closed:
            if _registered and place not in _registered:
                log.warning(
                    "%s is not among the stores of Gunicorn's hooks, whose options do not apply to it: %s; "
                    "is the name the same in both places?",
                    _url(place), ", ".join(sorted(map(_url, _registered))),
                )  # fmt: skip
            store = _attached[path] = _attach_or_start(place, given, explicit=bool(options))
        elif options:
            _manager(place, given).start()  # attaches, and gives the running server these options
        _users.setdefault(store, WeakSet()).add(user)
        return store
    finally:
        ticket.release()


def detach(store: AnyStore, user: object) -> None:
    """
    End the use of a store that `attach_or_start` has returned for this ``user``.

    After the last use the store is closed, and its server is not watched. The next `attach_or_start` opens another.
    """
    ticket = _attaching.ticket()
    try:
        ticket.acquire()
        users = _users.get(store, WeakSet())
        users.discard(user)
        if users:
            return
        store.close()
    finally:
        ticket.release()
    if isinstance(store, StoreProxy) and store._manager is not None:
        store._manager.detach()


def _on_network(url: str, options: Mapping[str, Any], user: object) -> AnyStore:
    ticket = _attaching.ticket()
    try:
        ticket.acquire()
        _on_servers[:] = [each for each in _on_servers if not each[2].closed]
        store = next((store for named, given, store in _on_servers if (named, given) == (url, options)), None)
        if store is None:
            store = redis_store(url, options)
            _on_servers.append((url, dict(options), store))
        _users.setdefault(store, WeakSet()).add(user)
        return store
    finally:
        ticket.release()


def _attach_or_start(place: urls.Location, given: Mapping[str, Any], *, explicit: bool) -> StoreProxy:
    if not explicit and not lacking(default=place.directory is None):
        files = StoreFiles.of(*place)
        with suppress(StoreUnavailable):
            # Access in place needs no connection, so this does not wait for a server that is being restarted.
            with suppress(connection.NoServer, ConnectionLimitReached, Unresponsive):
                connection.connect_as_starter(files).close()  # asks an unused server of another version to exit
            # A function, because Gunicorn's configuration may register other options at a HUP.
            return StoreProxy.attach(files, lambda: _registered.get(place, given))
    return _manager(place, given).store()


def _manager(place: urls.Location, given: Mapping[str, Any]) -> StoreManager:
    from shmstore.manager import StoreManager  # only now: with dill it takes as long to import as all else

    return StoreManager(place.name, **{**given, "directory": place.directory})
