"""
The session of one request, for any web framework: a mapping that is read on first access and written back key by key.

A framework integration does three things: it creates a `Session` from the id in the request's cookie, calls
`save(final=True)` before the response is sent, and sets or deletes the cookie as `cookie_of` says. `shmstore.flask` is
one such integration.

What only an integration needs is a function of this module, not a method: templates look up attributes before keys, so
each public name of a session hides a key.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any, ClassVar, Final, TypeVar

from msgspec import Raw

from shmstore.contract import KEEP, AnyStore, Loaded, NewOwner
from shmstore.errors import ConfigError, SerializationError, StoreFull, StoreUnavailable, safe_traceback
from shmstore.policy import PERMANENT, Duration, Policy
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

logger = logging.getLogger("shmstore")

# Key of a stored session whose id must change as soon as a response can set the cookie. Views never see it.
_ROTATE = "_rotate"

# How many ids from one request are looked up. Each costs a read, and a client can send hundreds. A browser has several
# cookies with one name only if they differ in domain or path.
_MAX_COOKIES = 8

# Errors after which a request can continue without a session, if `on_error` is "anonymous".
_STORE_ERRORS = (StoreUnavailable, StoreFull)

# A request is stale if another request of the same browser removed or changed the id in its cookie less than this many
# seconds ago. It may have been sent before the browser received the newer cookie, and must not overwrite that cookie.
# A navigation cancels the previous one together with its response, so a newer cookie is rarely still in transit. If the
# session was removed, that response deletes the cookie and sets none, so a navigation may start a session at once.
_STALE_AFTER: Final = 4.0
_STALE_NAVIGATION_AFTER: Final = 1.0

# Types whose values cannot change after they have been returned.
_IMMUTABLE = frozenset({type(None), bool, int, float, str, bytes})

_MISSING: Final = object()

_ENCODE_ATTEMPTS: Final = 10  # to encode values that other threads keep changing

_unavailable, _damaged, _unanswerable, _stale, _dropped, _ownerless = (Throttle() for _ in range(6))

T = TypeVar("T")


class Cookie(Enum):
    """What a response does with the session cookie."""

    KEEP = "keep"  # no header: the browser keeps the cookie it has, if any
    SEND = "send"  # Set-Cookie with the session's id
    DELETE = "delete"  # Set-Cookie that removes the cookie


class Session(MutableMapping[str, Any]):
    """
    One visitor's session during one request.

    Nothing is read before the first access, and nothing is stored before there is data. `save` writes the top-level
    keys whose encoded value has changed (a change deep inside a value counts; assigning an equal value does not) and
    leaves all other keys alone, so overlapping requests of one user keep each other's keys. If two requests change the
    same key, the later save wins; `lock` serialises them. A save never restores a session that another request has
    destroyed or rotated: the save is dropped.

    Threads of one request may share the session. All keys they set are kept, provided that each thread saves what it
    has set, or the response is saved afterwards.

    After the response has been sent, or without a response (a WebSocket), a save still changes a stored
    session. It does not create one, because no browser would learn the id. A change of the id waits for the next
    request that has a response.

    Args:
        store: Returns the store. It is a function so that a request that never accesses its session does not open
            the store.
        sid: The id in the request's cookie, if any, or the ids from several cookies with that name. The first id that
            the store knows is used.
        policy: The application's rules.
        request: The framework's request, for subclasses that inspect it.
    """

    #: Whether the response may depend on the session and therefore needs `Vary: Cookie`.
    accessed: bool = False

    # Keys of lists whose concurrent appends are merged.
    _merged_lists: ClassVar[frozenset[str]] = frozenset()

    # Values that an extension leaves in a session for the end of the same request, such as "remove your cookie too".
    # They survive `clear` and do not count as data: they alone create no session.
    _markers: ClassVar[Mapping[str, object]] = {}

    # Held while stored state is read or changed. `_load` creates it before any other use, so it is gevent's lock if
    # gevent has patched threading. Reentrant, because a serializer, `dispose` or an owner function may use the session.
    _lock: AbstractContextManager[bool]

    # State of a session that was not accessed, as in most requests. Class attributes save assigning them each time.
    _data: dict[str, Any] | None = None  # None: not read yet
    _record: Loaded | None = None  # what the store held at the last read or write; None: nothing
    _stored: dict[str, Raw] | None = None  # the encoded values of `_record`; None: not split yet
    _unreadable: Set[str] = frozenset()  # stored keys that are missing from `_data` because their values are unreadable
    _stored_sid = ""  # the id that `_record` is stored under
    _sid: str | None = None  # the id of this session after the next save; None: not chosen yet
    _new = True
    _cookie_valid = False  # the browser's cookie holds the id of a stored session
    _cleared = False
    _modified = False
    _was_modified = False  # before the last save
    _discarded = False  # nothing more is saved in this request
    _store_error: Exception | None = None  # the failure of the store after which it was discarded
    _was_written = False  # this request has written it to the store
    _stale_cookie = False  # the browser's cookie holds an id that was destroyed or rotated a moment ago
    _creation_refused = False  # this request could not create a session, and that was logged
    _response_sent = False
    _rotation_pending = False  # a new id is due, and no response can set it
    _cookie = Cookie.KEEP

    def __init__(
        self,
        store: Callable[[], AnyStore],
        sid: str | Sequence[str] | None,
        policy: Policy,
        *,
        request: Any = None,
    ) -> None:
        self._store = store
        self._cookie_sids = sid
        self._policy = policy
        self._request = request
        # Keys that were set or deleted, or whose mutable values were returned. No other key can have changed, so `save`
        # compares only these. A dict, to keep the order.
        self._maybe_dirty: dict[str, None] = {}

    # -- mapping -----------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        value = self._load()[key]
        if type(value) not in _IMMUTABLE:
            self._maybe_dirty[key] = None
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._load()[key] = value
        self._maybe_dirty[key] = None

    def __delitem__(self, key: str) -> None:
        data = self._load()
        if key in data or key not in self._unreadable:
            del data[key]
        self._unreadable -= {key}
        self._maybe_dirty[key] = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())

    def __contains__(self, key: object) -> bool:
        return key in self._load()

    def __bool__(self) -> bool:
        """Return whether there is data; being permanent does not count."""
        return self._has_data(self._load())

    def update(self, /, *args: Any, **kwargs: Any) -> None:  # the inherited method sets one key at a time
        """Set the keys of a mapping, of pairs of key and value, or of keywords."""
        values = dict(*args, **kwargs)
        if values:
            self._load().update(values)
            self._maybe_dirty |= dict.fromkeys(values)

    def __ior__(self, other: Mapping[str, Any]) -> Session:
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._load())

    def __repr__(self) -> str:
        # Tools that check or report a request print its whole environment: printing must not read the store.
        return f"<{type(self).__name__} {'not read yet' if self._data is None else self._data!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Reduce to a plain dict: copies and pickles belong to no request."""
        return dict, (self.copy(),)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or the default."""
        value = self._load().get(key, _MISSING)  # not `except KeyError`: opening the store may raise one
        if value is _MISSING:
            return default
        if type(value) not in _IMMUTABLE:
            self._maybe_dirty[key] = None
        return value

    def pop(self, key: str, default: Any = _MISSING) -> Any:
        """Remove a key and return its value, or the default if given and the key is missing."""
        data = self._load()
        if default is not _MISSING and key not in data:
            if key in self._unreadable:
                del self[key]  # the stored value is removed although it cannot be returned
            return default
        value = data.pop(key) if default is _MISSING else data.pop(key, default)
        self._maybe_dirty[key] = None
        return value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; set it to the default first if it is missing."""
        value = self._load().setdefault(key, default)  # atomic: of two threads only one sets it
        self._maybe_dirty[key] = None
        return value

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self) | dict(other)

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(other) | dict(self)

    def copy(self) -> dict[str, Any]:
        """Return the data as a separate dict."""
        data = dict(self._load())
        self._maybe_dirty |= dict.fromkeys(data)
        return data

    def clear(self) -> None:
        """Remove all data. If the session is still empty when it is saved, it is destroyed."""
        data, initial_data = self._load(), self._initial_data()
        with self._lock:
            self._maybe_dirty |= dict.fromkeys([*data, *self._unreadable, *initial_data])
            self._unreadable = frozenset()
            data.clear()
            data.update(initial_data)
            self._cleared = True

    # -- properties --------------------------------------------------------------------------------

    @property
    def sid(self) -> str:
        """The id: the browser's if the store knows it, otherwise a new one. After `rotate`, the next id."""
        self._load()
        with self._lock:
            sid = self._sid
            if sid is None:
                sid = self._sid = self._policy.new_id()
            return sid

    @property
    def new(self) -> bool:
        """Whether this request started the session."""
        self._load()
        return self._new

    @property
    def permanent(self) -> bool:
        """Whether the cookie outlives the browser."""
        return bool(self.get(PERMANENT, False))

    @permanent.setter
    def permanent(self, value: bool) -> None:
        self[PERMANENT] = bool(value)

    @property
    def modified(self) -> bool:
        """
        Whether this request has changed the session, saved or not. Values are compared, so changes deep inside them
        are found.

        Setting it is not needed to have changes saved; it makes the next `save` send the cookie again.
        """
        data = self._data
        if data is None:
            return False
        with self._lock:
            return self._modified or self._was_modified or any(self._find_changes(data.copy()))

    @modified.setter
    def modified(self, value: bool) -> None:
        self._load()
        self._modified = bool(value)
        self._was_modified &= self._modified

    # -- operations --------------------------------------------------------------------------------

    def save(self, *, refresh: bool = False, final: bool = False) -> bool:
        """
        Write what has changed since the session was read or last saved.

        Args:
            refresh: Send the cookie of a permanent session again even if nothing has changed.
            final: For framework integrations: the response is sent after this save.

        Returns:
            False if nothing of the session is stored: another request has destroyed or rotated it in the meantime (or
            just before, and this request came with the old id); a new session could not be announced to the browser by
            any response; or the store was unavailable and `on_error` is "anonymous". No cookie is sent then, and the
            reason is logged.

        Raises:
            StoreUnavailable: The store cannot be reached and `on_error` is "raise".
            SerializationError: A value cannot be stored. The stored session is unchanged.
            RecordTooLarge: The session has grown too large. The stored session is unchanged.
        """
        if self._data is None:
            self._response_sent |= final
        data = self._data  # read after the flag is set: a thread that loads from here on sees `_response_sent`
        if data is None:
            return not self._discarded
        with self._lock:
            stored = not self._discarded
            if stored:
                try:
                    stored = self._write(data.copy(), refresh)  # later changes of other threads are for the next save
                except _STORE_ERRORS as error:
                    self._degrade(error)
                else:
                    if not stored and self._record is not None:  # if it was not created, a login may still create it
                        self._discard()
            self._response_sent |= final
            return stored and not self._discarded

    def rotate(self) -> None:
        """
        Give the session a new id at the next save and keep its data. The old id is invalid from then on.

        If no response can set the cookie, the next request that has one changes the id.
        """
        self._load()
        with self._lock:
            if self._can_set_cookie():
                self._sid = self._policy.new_id()
            else:
                self._rotation_pending = True

    def regenerate(self) -> None:
        """Destroy the session and start a new, empty one under a new id. It is stored once there is data."""
        self.destroy()

    def destroy(self) -> bool:
        """
        Destroy the session at once. Data that is set afterwards starts a new session under a new id.

        Returns:
            Whether there was a stored session. False if another request of this browser destroyed or rotated it first:
            the browser may have a newer cookie, so this response sets none, and only a login starts a new session.
        """
        self._load()
        with self._lock:
            ended = self._destroy_stored_session()
            self._stale_cookie |= self._discarded and self._record is None  # the browser's cookie is not known
            self._discarded, self._store_error = False, None
            self._reset()
            return ended

    def destroy_others(self) -> int:
        """
        Log out the other devices: destroy all other sessions of this session's user in the whole store.

        The user is what `SESSION_OWNER_KEY` finds in the session now, saved or not.

        Returns:
            The number of destroyed sessions. 0, with a log line, if no user is logged in; 0 also if this session itself
            has been destroyed, or an overlapping request has changed its id. A request that changes the id during the
            call waits.

        Raises:
            ConfigError: `SESSION_OWNER_KEY` is None: sessions have no owners.
            StoreUnavailable, StoreFull: The store cannot be reached, or failed earlier in this request. Raised whatever
                `on_error` is, because some sessions may not have been destroyed.
        """
        if not self._policy.has_owners:
            raise ConfigError("destroy_others() needs to know the owner of a session: set SESSION_OWNER_KEY")
        data = self._load()
        with self._lock:
            if self._store_error is not None:  # the session was not read: the user is not known
                raise self._store_error
            owner = self._policy.owner(data.copy())
            if owner is None and (times := _ownerless.due()):
                logger.warning(
                    "%d calls of destroy_others() ended nothing: SESSION_OWNER_KEY finds no user in the session", times
                )
            if owner is None or self._discarded:
                return 0
            store, key = self._store(), self._store_key(self._stored_sid)
            if self._record is None:
                return store.destroy_owned(owner)
            with store.lock(_id_lock_name(key)):
                if key in store:
                    return store.destroy_owned(owner, [key, self._store_key(self.sid)])
            self._discard()
            return 0

    def reload(self) -> bool:
        """
        Read the session again and discard unsaved changes.

        Returns:
            Whether it is stored. If it was stored before and has been removed, it is now empty and saves nothing.
        """
        data, after = self._load(), None
        with self._lock:
            if self._record is not None:
                after = self._try_store(lambda: self._fetch(self._stored_sid), None)
                if after is None:
                    self._discard()
            there = self._initial_data() if after is None else after
            for key in list(data):  # never empty in between: other threads may be reading it
                if key not in there:
                    data.pop(key, None)
            data.update(there)
            self._cleared = self._modified = False
            return after is not None

    def touch(self) -> bool:
        """
        Renew the session's ttl now. A request that accesses its session does so when it is due.

        Returns:
            Whether the session is stored.
        """
        self._load()
        with self._lock:
            record = self._record
            if record is None or self._discarded:
                return False
            life = self._policy.remaining_ttl(record.created)
            if not self._try_store(lambda: self._store().touch(self._store_key(self._stored_sid), ttl=life), True):
                self._discard()
            self._record = record._replace(remaining=life)
            return not self._discarded

    @contextmanager
    def lock(self, timeout: Duration = 5.0) -> Iterator[None]:
        """
        Serialise with other requests that use this lock: for a value that is read, changed and written back.

        The session is read again when the lock is acquired, and saved when it is released. If an exception leaves the
        block, all unsaved changes are discarded, also those of other threads of this request. Requests that do not use
        the lock are not delayed. The lock is released when its process ends.

        Args:
            timeout: How long to wait for the lock, in seconds or as a timedelta.

        Raises:
            StoreTimeout: The lock was not free in time.
        """
        self._load()
        self.save()
        known = self._record is not None  # otherwise no other request can use the session
        with self._store().lock(self._store_key(self._stored_sid), timeout) if known else nullcontext():
            with self._lock:
                if known:
                    self.save()  # what other threads of this request have set while this one waited
                self.reload()
            try:
                yield
                self.save()
            except BaseException:
                self.reload()
                raise

    # -- reading -----------------------------------------------------------------------------------

    def _load(self) -> dict[str, Any]:
        data = self._data
        if data is None:
            with self.__dict__.setdefault("_lock", threading.RLock()):  # atomic: of two threads only one creates it
                data = self._data
                if data is None:
                    data = self._data = self._read()
        return data

    def _read(self) -> dict[str, Any]:
        self.accessed = True
        claimed = (self._cookie_sids,) if isinstance(self._cookie_sids, str) else self._cookie_sids or ()
        tried: list[str] = []
        try:
            for sid in claimed:
                if not sid or sid in tried or not self._policy.is_id(sid):
                    continue  # empty, tried, or malformed: another application's or invented
                data = self._fetch(sid)
                if data is not None:
                    self._new, self._cookie_valid = False, True
                    return data
                tried.append(sid)
                if len(tried) == _MAX_COOKIES:
                    break
            self._stale_cookie = any(self._is_stale(sid) for sid in tried)
        except _STORE_ERRORS as error:
            self._degrade(error)
        return self._policy.initial_data()

    def _fetch(self, sid: str) -> dict[str, Any] | None:
        """Read the session stored under an id and adopt it; return its data, or None if it is not stored."""
        store, key = self._store(), self._store_key(sid)
        record = store.load(key)
        if record is not None and self._policy.past_limits(record):
            store.touch(key, ttl=0)  # expire it; destroying it would leave a tombstone and make the request stale
            record = None
        self._record = self._stored = self._sid = None
        self._rotation_pending = False
        self._unreadable = frozenset()
        if record is None:
            return None
        try:
            data = store.codec.decode(record.payload)
        except SerializationError:
            try:
                data, self._unreadable = store.codec.salvage(record.payload)
                for key in self._unreadable:
                    self._maybe_dirty.pop(key, None)
            except SerializationError as error:
                if times := _damaged.due():
                    logger.error(  # noqa: TRY400
                        "%s: %d stored sessions are damaged; their visitors start new sessions: %s",
                        store.label, times, safe_traceback(error.__cause__ or error),
                    )  # fmt: skip
                return None
        self._record = record
        self._sid = self._stored_sid = sid
        if data.pop(_ROTATE, False) and self._can_set_cookie():
            self._sid = self._policy.new_id()
            self._maybe_dirty[_ROTATE] = None
        return data

    def _can_set_cookie(self) -> bool:
        """Return whether there is a response that can still set the cookie."""
        return not self._response_sent

    def _is_navigation(self) -> bool:
        """Return whether this request is a navigation: for a whole page that replaces the displayed one."""
        return False

    def _is_stale(self, sid: str) -> bool:
        """Return whether the browser may hold a newer cookie than the one with this id, which the store lacks."""
        is_navigation = self._is_navigation()
        within = _STALE_NAVIGATION_AFTER if is_navigation else _STALE_AFTER
        return self._store().gone(self._store_key(sid), within, renamed=is_navigation)

    def _find_changes(self, data: dict[str, Any], attempts: int = _ENCODE_ATTEMPTS) -> tuple[dict[str, Raw], list[str]]:
        """Return the keys whose encoded values differ from the stored ones, and the stored keys that were removed."""
        record = self._record
        changed: dict[str, Raw] = {}
        removed: list[str] = []
        try:
            if record is None:
                codec = self._store().codec
                changed = codec.raws(codec.encode(data))
            elif self._maybe_dirty:
                codec = self._store().codec
                if self._stored is None:
                    self._stored = codec.raws(record.payload)
                for key in list(self._maybe_dirty):
                    if key not in data:
                        if key in self._stored:
                            removed.append(key)
                    elif (raw := Raw(codec.encode_value(key, data[key]))) != self._stored.get(key):
                        changed[key] = raw
        except (SerializationError, RuntimeError) as error:
            pass_on_interruption(error)
            # Python's "changed size during iteration": another thread is changing a value.
            cause = error.__cause__ or error
            if attempts == 1 or not isinstance(cause, RuntimeError) or isinstance(cause, RecursionError):
                raise
            return self._find_changes(data, attempts - 1)
        return changed, removed

    # -- writing -----------------------------------------------------------------------------------

    def _write(self, data: dict[str, Any], refresh: bool) -> bool:
        """Update the store; return False if the session is not stored any more."""
        record, policy = self._record, self._policy
        if record is None and not self._has_data(data):
            return True
        owner = policy.owner(data)
        if record is not None and self._unreadable:
            owner = self._resolve_unreadable(data, owner, record)
        changed, removed = self._find_changes(data)
        if record is None:
            return self._may_create(owner) and self._create(changed, owner)

        ends = self._cleared or owner != record.owner
        if ends and (changed or removed) and not self._has_data(data) and not self._unreadable:
            self._destroy_stored_session()
            self._detach()
            self._was_modified = True
            return True
        if owner != record.owner and self._sid == self._stored_sid and self._is_another_user(owner, record):
            self.rotate()  # an id planted before the login must be invalid after it (session fixation)
        if self._rotation_pending:
            changed[_ROTATE] = Raw(self._store().codec.encode_value(_ROTATE, True))
            self._rotation_pending = False

        life = policy.remaining_ttl(record.created)
        rotated = self._sid != self._stored_sid
        permanent = bool(data.get(PERMANENT))
        resend = self._modified or (refresh and permanent)
        if rotated or changed or removed or owner != record.owner:
            stored = self._replace(data, changed, removed, life, KEEP if owner == record.owner else owner)
            resend |= rotated or permanent or PERMANENT in changed or PERMANENT in removed
        elif policy.is_touch_due(record, life):
            stored = self._store().touch(self._store_key(self._stored_sid), ttl=life)
        else:
            return not resend or self._resend_cookie()
        if not stored:
            if (changed or removed) and (times := _dropped.due()):
                logger.warning(
                    "%s: %d saves dropped: another request had destroyed the session or changed its id",
                    self._store().label, times,
                )  # fmt: skip
            return False

        self._mark_saved(changed, removed, Loaded(record.payload, record.created, record.idle, life, owner))
        if resend and self._can_set_cookie():
            self._cookie = Cookie.SEND
        if removed and not self._has_data(data):
            self._discard_if_empty()
        return True

    def _resolve_unreadable(self, data: dict[str, Any], owner: str | None, record: Loaded) -> str | None:
        """Mark unreadable values that must not survive a change of user for removal; return the owner."""
        self._unreadable -= self._maybe_dirty.keys()  # replaced or deleted
        obsolete = set[str]()
        if owner is None:
            candidates = {key for key in self._unreadable if self._policy.may_determine_owner(key)}
            if candidates and not self._is_logout(data):
                return record.owner
            obsolete = candidates
        elif record.owner not in (None, owner) and self._is_another_user(owner, record):
            obsolete = set(self._unreadable)
        self._unreadable -= obsolete
        self._maybe_dirty |= dict.fromkeys(obsolete)
        return owner

    def _is_logout(self, data: dict[str, Any]) -> bool:
        """Return whether this request logged out a user whose key is unreadable and so could not be removed."""
        return False

    def _is_another_user(self, owner: str | None, record: Loaded) -> bool:
        """Return whether the user has changed in this request, and not only the rule that determines the owner."""
        if self._was_written:
            return True
        codec, policy = self._store().codec, self._policy
        read = codec.readable(record.payload)
        before = policy.owner(read)
        if before is None and any(map(policy.may_determine_owner, codec.fields(record.payload).keys() - read.keys())):
            before = record.owner
        return before != owner

    def _may_create(self, owner: str | None) -> bool:
        """Return whether a session can be created; log the reason if not."""
        if not self._can_set_cookie():
            if not self._creation_refused and (times := _unanswerable.due()):
                logger.warning(
                    "%s: %d new sessions not stored: no response can set their cookie",
                    self._store().label, times,
                )  # fmt: skip
            self._creation_refused = True
            return False
        # A stale request must not overwrite the newer cookie that the browser may already hold.
        if self._stale_cookie and not self._is_login(owner):
            if not self._creation_refused and (times := _stale.due()):
                logger.warning(
                    "%s: %d new sessions not stored: another request had just replaced the id in their cookie",
                    self._store().label, times,
                )  # fmt: skip
            self._creation_refused = True
            return False
        return True

    def _replace(
        self, data: dict[str, Any], changed: dict[str, Raw], removed: list[str], life: float, owner: NewOwner
    ) -> bool:
        """Write changes, under another id if one was chosen; return False if the session is not stored any more."""
        store, key = self._store(), self._store_key(self._stored_sid)
        lists = self._merged_lists.intersection([*changed, *removed])
        if not lists:
            return self._write_changes(store, key, changed, removed, life, owner)
        with store.lock(f"lists {key}"):
            for name in lists:
                self._merge_list(name, data, changed, removed)
            return self._write_changes(store, key, changed, removed, life, owner)

    def _write_changes(
        self, store: AnyStore, key: str, changed: dict[str, Raw], removed: list[str], life: float, owner: NewOwner
    ) -> bool:
        if self._sid != self._stored_sid:
            with store.lock(_id_lock_name(key)):
                new = self._store_key(self.sid)
                return store.rename(key, new, changed, removed, ttl=life, owner=owner, tombstone=True)
        return store.update(key, changed, removed, ttl=life, owner=owner)

    def _merge_list(self, name: str, data: dict[str, Any], changed: dict[str, Raw], removed: list[str]) -> None:
        """Merge items that another request has appended since the read; leave out items that either has removed."""
        store = self._store()
        record = store.load(self._store_key(self._stored_sid))
        stored = self._stored or {}
        raw = store.codec.raws(record.payload).get(name) if record else None
        if raw == stored.get(name):
            return
        try:
            before, theirs = (store.codec.decode_value(each) if each else [] for each in (stored.get(name), raw))
        except SerializationError:
            return  # it is unreadable: this request's list replaces it
        ours = data.get(name, [])
        if not isinstance(before, list) or not isinstance(theirs, list) or not isinstance(ours, list):
            return
        now = list(ours)
        kept = theirs if _starts_with(now, before) else _appended(theirs, before)
        appended = _appended(now, before)
        if kept or appended:
            # In place, because another thread may be appending to it.
            live = ours if name in data else self._load().setdefault(name, [])
            live[: len(now) - len(appended)] = kept
            changed[name] = Raw(store.codec.encode_value(name, kept + appended))
            removed[:] = [each for each in removed if each != name]

    def _is_login(self, owner: str | None) -> bool:
        """Return whether the visitor authenticated in this request: a login gets a session even if it is stale."""
        return owner is not None

    def _create(self, values: dict[str, Raw], owner: str | None) -> bool:
        life = self._policy.remaining_ttl(0)
        while not self._store().add(self._store_key(self.sid), values, ttl=life, owner=owner):
            self.rotate()
        self._mark_saved(values, [], Loaded(b"", 0, 0, life, owner))
        self._cookie = Cookie.SEND
        return True

    def _mark_saved(self, changed: dict[str, Raw], removed: list[str], record: Loaded) -> None:
        """Note what the store holds now. `_maybe_dirty` stays: the holder of a mutable value may change it again."""
        self._was_written = True
        self._was_modified |= self._modified or bool(changed or removed)
        self._record, self._stored_sid = record, self.sid
        if self._stored is None and not record.payload:  # it was created just now
            self._stored = {}
        if self._stored is not None:
            self._stored.update(changed)
            for key in removed:
                self._stored.pop(key, None)
        self._cleared = self._modified = False

    def _resend_cookie(self) -> bool:
        """Send the cookie again if the session is still stored; otherwise the browser may hold a newer cookie."""
        if self._store_key(self._stored_sid) not in self._store():
            return False
        self._was_modified |= self._modified
        self._modified = False
        if self._can_set_cookie():
            self._cookie = Cookie.SEND
        return True

    def _discard_if_empty(self) -> None:
        """Destroy the session if this request removed its last key and no other request has added one."""
        store, can_reply = self._store(), self._can_set_cookie()
        if store.destroy_if_empty(self._store_key(self._stored_sid), [PERMANENT], tombstone=can_reply):
            self._detach()
            self._cookie = Cookie.DELETE if self._cookie_valid and can_reply else Cookie.KEEP

    def _discard(self) -> None:
        """Save nothing more and send no cookie over a newer one: another request has ended the session."""
        self._discarded, self._cookie = True, Cookie.KEEP

    def _destroy_stored_session(self) -> bool:
        """Destroy the stored session; return whether there was one."""
        if self._record is None:
            return False
        ended = self._try_store(self._destroy_in_store, False)
        self._cookie = Cookie.DELETE if ended and self._cookie_valid and self._can_set_cookie() else Cookie.KEEP
        return ended

    def _destroy_in_store(self) -> bool:
        store, key = self._store(), self._store_key(self._stored_sid)
        # Without a response the browser gets no newer cookie that a stale request could overwrite.
        if store.destroy(key, tombstone=self._can_set_cookie()):
            return True
        self._stale_cookie = store.gone(key)  # of any age: this request started before the session was removed
        return False

    def _reset(self) -> None:
        """Become a new, empty session."""
        data, initial_data = self._load(), self._initial_data()
        data.clear()
        data.update(initial_data)
        self._detach()

    def _detach(self) -> None:
        """Become a new session that keeps the current data: another thread may have set some just now."""
        self._record = self._stored = self._sid = None
        self._unreadable = frozenset()
        self._new = True
        self._rotation_pending = self._cleared = self._modified = False

    def _initial_data(self) -> dict[str, Any]:
        """Return what remains when all data is removed: the permanent flag and the markers for this request's end."""
        data = self._load()
        return self._policy.initial_data() | {key: each for key, each in self._markers.items() if data.get(key) == each}

    def _has_data(self, data: dict[str, Any]) -> bool:
        """Return whether there is data: neither the permanent flag nor markers count."""
        messages = self._markers
        if len(data) > len(messages) + 1:
            return True
        return any(key != PERMANENT and (key not in messages or messages[key] != data[key]) for key in data)

    def _try_store(self, work: Callable[[], T], otherwise: T) -> T:
        """Call a function that needs the store; if the store is unavailable, degrade and return `otherwise`."""
        try:
            return work()
        except _STORE_ERRORS as error:
            self._degrade(error)
            return otherwise

    def _degrade(self, error: Exception) -> None:
        """Stop using the store in this request after an error; raise the error if `on_error` is "raise"."""
        self._discarded, self._store_error = True, error
        if self._data is None:
            # Fail once: the page that reports the error finds an empty session and does not wait again.
            self._data = self._policy.initial_data()
        if self._policy.on_error == "raise":
            raise error
        if times := _unavailable.due():
            logger.warning("the session store is unavailable: %d requests continue without sessions: %s", times, error)

    def _store_key(self, sid: str) -> str:
        return self._policy.key_prefix + sid


def cookie_of(session: Session) -> Cookie:
    """For framework integrations: what the response does with the cookie. Call it after `Session.save`."""
    return session._cookie


def discard(session: Session) -> None:
    """For framework integrations: save nothing more, because a failed save is about to be reported."""
    session._discarded = True


def _id_lock_name(key: str) -> str:
    """Name the lock held while an id changes, or while the owner's other sessions are destroyed."""
    return f"id {key}"


def _starts_with(whole: list[Any], part: list[Any]) -> bool:
    return whole[: len(part)] == part


def _appended(after: list[Any], before: list[Any]) -> list[Any]:
    """Return the items appended to a list; all of them if it does not start with the items it had before."""
    return after[len(before) :] if _starts_with(after, before) else after
