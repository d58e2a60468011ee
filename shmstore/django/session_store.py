"""The session engine of Django, and the store of its settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

try:
    from django.conf import global_settings, settings
    from django.contrib.sessions.backends.base import CreateError, SessionBase, UpdateError
    from django.contrib.sessions.exceptions import SessionInterrupted
    from django.core import checks
except ImportError as error:
    raise ImportError("shmstore.django needs Django: pip install 'shmstore[django]'") from error
from msgspec import Raw

from shmstore.attach import attach_or_start, check
from shmstore.codec.body import log_unreadable
from shmstore.codec.ids import MAX_ID_BYTES
from shmstore.contract import KEEP, Loaded
from shmstore.errors import ConfigError, SerializationError
from shmstore.policy import STALE_AFTER, Policy
from shmstore.system.blocking import before_blocking
from shmstore.system.event_loop import in_thread, run
from shmstore.system.forks import on_fork

if TYPE_CHECKING:
    from shmstore.contract import AnyStore

__all__ = ["SessionStore", "store"]

log = logging.getLogger("shmstore")

_USER_KEY: Final = "_auth_user_id"  # the name in django.contrib.auth
_RULES: Final = ("key_prefix", "owner_key")
_WITHOUT_EFFECT: Final = {
    "ttl": "sessions of Django live for SESSION_COOKIE_AGE, or as set_expiry says",
    "stale": "an expired session of Django is a new one",
}

T = TypeVar("T")


class SessionStore(SessionBase):  # type: ignore[misc] # Django has no types
    """
    One visitor's session during one request, as Django's middleware uses it.

    `save` writes the top-level keys whose values are not the stored ones, so overlapping requests keep each other's
    keys. A session that was deleted or got another key in the meantime is not restored: `save` raises `UpdateError`.
    """

    _session_key: str | None  # a property of the base class
    _loaded: Loaded | None = None  # what the store held at the last load or save; None: the whole session is written
    _unreadable: frozenset[Any] = frozenset()  # stored keys that are missing here because their values are unreadable
    # Another request of this browser has ended the session in its cookie a moment ago, or replaced the key.
    _recently_deleted = _recently_replaced = False

    def load(self) -> dict[str, Any]:
        """Return the stored data. If nothing is stored, forget the key: one that a client invented is never used."""
        store, policy = _open()
        key = _store_key(policy, self.session_key)
        self._loaded = loaded = store.load(key)
        self._unreadable = frozenset()
        if loaded is not None:
            try:
                return store.codec.decode(loaded.payload)
            except SerializationError:
                pass
            try:
                data, unreadable = store.codec.salvage(loaded.payload)
            except SerializationError as error:
                log_unreadable(store.label, "(a whole session)", error)
            else:
                self._unreadable = frozenset(unreadable)
                return data
        self._loaded = self._session_key = None
        self._recently_deleted = store.gone(key, STALE_AFTER)
        self._recently_replaced = self._recently_deleted and store.gone(key, STALE_AFTER, renamed=True)
        return {}

    def exists(self, session_key: str | None) -> bool:
        """Return whether a session is stored under a key."""
        store, policy = _open()
        return _store_key(policy, session_key) in store

    def create(self) -> None:
        """Store this session under a new key."""
        before = self._session_key
        while True:
            self._session_key = self._get_new_session_key()
            try:
                self.save(must_create=True)
            except CreateError:
                continue
            except BaseException:
                self._session_key = before  # the call can be repeated
                raise
            self.modified = True
            return

    def save(self, must_create: bool = False) -> None:
        """
        Store the top-level keys whose values have changed; keys that other requests have changed stay.

        Args:
            must_create: Create the session.

        Raises:
            CreateError: ``must_create``, and a session is stored under this key.
            UpdateError: The session was deleted or got another key, during this request or just before it.
            SerializationError: A value cannot be stored; the message names it. The stored session is unchanged.
        """
        data = self._get_session(no_load=must_create)
        store, policy = _open()
        owner, loaded = policy.owner(data), self._loaded
        is_late = self._recently_deleted or self._recently_replaced
        if is_late and not (must_create or _has_user(data, owner)):
            raise UpdateError  # the cookie of this request would replace the newer one that the browser may hold
        if self.session_key is None:
            self.create()
        elif loaded is not None and not must_create:
            if not self._update(data, loaded):
                raise UpdateError
        else:
            key, ttl = _store_key(policy, self.session_key), self.get_expiry_age()
            payload = store.codec.encode(data, loaded and loaded.payload)
            write = store.add if must_create else store.replace
            if not key or not write(key, Raw(payload), ttl=ttl, owner=owner):
                raise CreateError if must_create else UpdateError
            self._loaded, self._unreadable = Loaded(payload, 0, 0, ttl, owner), frozenset()

    def _update(self, data: dict[str, Any], loaded: Loaded, new_key: str | None = None) -> bool:
        """
        Store what has changed since the session was loaded, under a new key if there is one.

        Returns:
            Whether the session is still stored.
        """
        store, policy = _open()
        key, ttl, owner = _store_key(policy, self.session_key), self.get_expiry_age(), policy.owner(data)
        unreadable = self._unreadable.difference(data)
        if owner is None and any(map(policy.may_determine_owner, unreadable)):
            owner = loaded.owner  # it is not known that the user has logged out
        elif owner is not None and loaded.owner not in (None, owner):
            unreadable = frozenset()  # they are another user's
        new_owner = KEEP if owner == loaded.owner else owner
        # `cycle_key` has to encode only what is known to be modified: a save follows.
        payload = store.codec.encode(data, loaded.payload) if self.modified or not new_key else loaded.payload
        can_swap = loaded.handle is not None and store.codec.is_deterministic and not unreadable and not new_key
        # Usually no other request has changed the session since it was loaded, and there is nothing to merge.
        if can_swap and payload != loaded.payload and store.swap(key, loaded, payload, ttl=ttl, owner=new_owner):
            self._loaded = Loaded(payload, 0, 0, ttl, owner)
            return True
        changed, missing = ({}, []) if payload == loaded.payload else store.codec.changes(loaded.payload, payload)
        removed = [name for name in missing if name not in unreadable]
        if new_key:
            new = _store_key(policy, new_key)
            stored = store.rename(key, new, changed, removed, ttl=ttl, owner=new_owner, tombstone=True)
        elif changed or removed or new_owner is not KEEP:
            stored = store.update(key, changed, removed, ttl=ttl, owner=new_owner)
        else:
            stored = store.touch(key, ttl=ttl)
        if stored:
            self._loaded = Loaded(store.codec.merge(loaded.payload, changed, removed), 0, 0, ttl, owner)
            self._unreadable = unreadable
        return stored

    def delete(self, session_key: str | None = None) -> None:
        """Delete the session stored under a key; None: this session."""
        store, policy = _open()
        store.destroy(_store_key(policy, self.session_key if session_key is None else session_key))

    def flush(self) -> None:
        """
        Delete the session and become a new one, as a logout does.

        Raises:
            SessionInterrupted: Another request has given this session another key, under which it is still stored.
        """
        self.clear()
        store, policy = _open()
        key = _store_key(policy, self.session_key)
        if not store.destroy(key, tombstone=True) and store.gone(key, renamed=True):
            raise SessionInterrupted("The session's key was changed by another request before it could be deleted.")
        self._session_key = None
        self._recently_deleted = False  # a second click on logout is answered as the first

    def clear(self) -> None:
        """Remove all data, also what other requests have set in the meantime."""
        super().clear()
        self._loaded = None

    def cycle_key(self) -> None:
        """
        Move the session to a new key in one step, with what other requests have set in the meantime.

        Raises:
            SessionInterrupted: A user was logged in, and the session was deleted in the meantime: a logout is final.
        """
        data, loaded = self._session, self._loaded
        if loaded is not None:
            new_key = self._get_new_session_key()
            if self._update(data, loaded, new_key):
                self._session_key, self.modified = new_key, True
                return
            if _has_user(data, loaded.owner):
                raise SessionInterrupted("The session was deleted before its key could be changed.")
            store, policy = _open()
            self._recently_replaced = store.gone(_store_key(policy, self.session_key), renamed=True)
        if self.session_key is not None:
            before_blocking()  # the base class creates one session and deletes another: that cannot be repeated
        super().cycle_key()

    def is_empty(self) -> bool:
        """Return whether the middleware is to delete the cookie: not if the browser may hold a newer one."""
        if not super().is_empty() or self._recently_replaced:
            return False
        return not self._recently_deleted or self.modified or settings.SESSION_SAVE_EVERY_REQUEST

    @classmethod
    def clear_expired(cls) -> None:
        """Remove expired sessions: ``manage.py clearsessions``. The server of a store does so by itself, too."""
        store().prune()

    def _get_new_session_key(self) -> str:
        return _open()[1].new_id()  # `create` finds out whether it is used

    # -- the same for asynchronous views; what is missing here Django derives from these ---------------------------

    async def aload(self) -> dict[str, Any]:
        return await _call(self.load)

    async def aexists(self, session_key: str | None) -> bool:
        return await _call(self.exists, session_key)

    async def acreate(self) -> None:
        await _call(self.create)

    async def asave(self, must_create: bool = False) -> None:
        await _call(self.save, must_create)

    async def adelete(self, session_key: str | None = None) -> None:
        await _call(self.delete, session_key)

    async def aflush(self) -> None:
        await _call(self.flush)

    async def acycle_key(self) -> None:
        await _call(self.cycle_key)

    async def _aget_new_session_key(self) -> str:
        return await _call(self._get_new_session_key)


def _has_user(data: dict[str, Any], owner: str | None) -> bool:
    """Return whether a user is logged in, also if ``OWNER_KEY`` names something else or nothing."""
    return owner is not None or _USER_KEY in data


def _store_key(policy: Policy, session_key: str | None) -> str:
    """Return the id in the store; "", which is never stored, if the key does not have the form of one."""
    key = policy.key_prefix + session_key if session_key and policy.is_id(session_key) else ""
    return key if len(key) <= MAX_ID_BYTES else ""


async def _call(function: Callable[..., T], *args: Any) -> T:
    """Call a method that can be repeated from its start: at once, or in a thread if it would block the event loop."""
    work, store = partial(function, *args), _process.store
    return await (in_thread(work) if store is None or store.closed else run(work))


class _Process:
    """The value of ``SHMSTORE`` that this process has checked, and what it has opened."""

    configured: object = None
    source: Callable[[], AnyStore]
    policy: Policy
    store: AnyStore | None = None

    def after_fork_in_child(self) -> None:
        self.store = None  # a worker may become another user, whose store is another one


_process = _Process()
on_fork(_process)


def store() -> AnyStore:
    """
    Return the store that the settings name: ``store().destroy_owned(str(user.pk))`` logs a user out on all devices.

    Raises:
        ConfigError, StoreFull, StoreUnavailable: As `shmstore.attach.attach_or_start`.
    """
    return _open()[0]


def _open() -> tuple[AnyStore, Policy]:
    """
    Return the store and the rules for its sessions.

    Raises:
        ConfigError: The settings are invalid; the message says what is valid.
    """
    process, configured = _process, getattr(settings, "SHMSTORE", None)
    if process.configured is not configured or configured is None:
        process.source, process.policy = _checked(configured)
        process.configured, process.store = configured, None
        if settings.SESSION_SERIALIZER != global_settings.SESSION_SERIALIZER:
            log.warning("SESSION_SERIALIZER has no effect here: use SHMSTORE = {'serializer': ...}")
    store = process.store
    if store is None or store.closed:
        store = process.store = process.source()
        for name, reason in _WITHOUT_EFFECT.items():
            if getattr(store.options, name) not in (None, False):
                log.warning("%s: its option %s has no effect here: %s", store.label, name, reason)
    return store, process.policy


def _checked(configured: object) -> tuple[Callable[[], AnyStore], Policy]:
    """Return what opens the store that the settings name, and the rules for its sessions."""
    if not isinstance(configured, Mapping) or not all(isinstance(name, str) for name in configured):
        raise ConfigError(f"SHMSTORE must be a dict such as {{'STORE': 'shm://shop'}}, not {configured!r}")
    options = {name.lower(): value for name, value in configured.items()}
    if len(options) < len(configured):
        raise ConfigError("SHMSTORE has a key in lower and in upper case")
    store = options.pop("store", None)
    rules = {"owner_key": _USER_KEY} | {rule: options.pop(rule) for rule in _RULES if rule in options}
    for name, reason in _WITHOUT_EFFECT.items():
        if options.get(name) not in (None, False):
            raise ConfigError(f"SHMSTORE: {name} has no effect here: {reason}")
    try:
        # Django says how long a session lives. Columns for its key have 40 characters: 30 bytes of entropy.
        policy = Policy(**rules, ttl=math.inf, id_length=30)
        if isinstance(store, str):
            check(store, options)
    except ConfigError as error:
        raise ConfigError(f"SHMSTORE: {error}") from None
    if isinstance(store, str):
        return partial(attach_or_start, store, options), policy
    if not hasattr(store, "load"):
        raise ConfigError(
            f"SHMSTORE: STORE must be 'shm://<name>', 'redis://<host>', or a store such as Store(), not {store!r}"
        )
    if options:
        raise ConfigError(f"SHMSTORE: {', '.join(options)}: pass the options to the store when you create it")
    return lambda: store, policy


@checks.register  # type: ignore[untyped-decorator]
def _check_settings(app_configs: object, **kwargs: Any) -> list[Any]:
    """Let ``manage.py check`` find invalid settings."""
    configured = getattr(settings, "SHMSTORE", None)
    if configured is None and __package__ != settings.SESSION_ENGINE:
        return []
    try:
        _checked(configured)
    except ConfigError as error:
        return [checks.Error(str(error), id="shmstore.E001")]
    return []
