"""
The session of one request, for any web framework: a mapping that is read when it is first looked at, and
written back key by key.

A framework's glue does three things: it makes a `Session` of the id in the request's cookie, calls `save(final=True)`
before the response leaves, and obeys `cookie_of`. `shmstore.flask` is such a glue.

What only a glue needs is a function here and no method: templates look up attributes before keys, so each public name
of a session hides a key.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from msgspec import Raw

from shmstore.errors import ConfigError, SerializationError, StoreFull, StoreUnavailable, outline
from shmstore.policy import PERMANENT, Duration, Policy
from shmstore.store.operations import KEEP, NewOwner
from shmstore.store.stats import Loaded
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

if TYPE_CHECKING:
    from shmstore.redis import RedisStore
    from shmstore.store.store import Store

    AnyStore = Store | RedisStore

logger = logging.getLogger("shmstore")

# Stored in a session that is to get a new id as soon as the browser can be told; no view sees it.
_ROTATE = "_rotate"

# How many ids of one request are tried: each costs a read, and a client can send hundreds. A browser has several
# cookies of one name only if they differ in domain or path.
_MOST_COOKIES = 8

# What a request may be asked to go on without.
_NO_STORE = (StoreUnavailable, StoreFull)

# A request is stale if it comes with an id that another request of its browser has removed or changed so few seconds
# ago: it may have been sent before the browser got the newer cookie, and must not overwrite that. A navigation cancels
# the one before it, and with it the answer that had the newer cookie: so hardly any can be on its way. If the session
# was removed, that answer has no newer cookie, but deletes ours: so a navigation may begin a session at once.
_STALE_AFTER: Final = 4.0
_STALE_NAVIGATION_AFTER: Final = 1.0

# Values that cannot change once they are handed out.
_IMMUTABLE = frozenset({type(None), bool, int, float, str, bytes})

_MISSING: Final = object()

_ATTEMPTS: Final = 10  # to encode values that other threads keep changing

_unavailable, _damaged, _unheard, _stale, _dropped, _ownerless = (Throttle() for _ in range(6))

T = TypeVar("T")


class Cookie(Enum):
    """What a response says about the session cookie."""

    KEEP = "keep"  # nothing: the browser keeps whatever it has
    SEND = "send"  # Set-Cookie with the session's id
    DELETE = "delete"  # Set-Cookie that removes it


class Session(MutableMapping[str, Any]):
    """
    One visitor's session during one request.

    Nothing is read before the session is looked at, and nothing is stored before there are data. `save`
    writes the top-level keys whose stored form has changed (so a change deep inside a value counts, and
    assigning the same value again does not), and leaves all others alone: requests of one user that overlap
    keep each other's keys. Of two that change the same key the later one wins; `lock` makes them take turns. A save
    never brings a session back that another request has destroyed or rotated away: it is dropped.

    Threads of one request may share it. The keys they put in are all kept, as long as each saves what it has put in, or
    the response does.

    Once the response has left, or if there is none (a WebSocket), a save still changes a stored session. It begins
    none: no browser would know its id. A change of the id waits for the next request that has a response.

    Args:
        store: Gives the store. A function, because a request that never looks at its session shall not even
            open it.
        sid: The id in the request's cookie, if any; or those of several cookies of that name. The first one that the
            store knows counts.
        policy: The application's rules.
        request: The framework's request, for subclasses that look at it.
    """

    #: Whether the response may depend on the session: it then needs `Vary: Cookie`.
    accessed: bool = False

    # Keys of lists that requests add to: what overlapping requests add is all kept, like votes and unlike opinions.
    _lists: ClassVar[frozenset[str]] = frozenset()

    # What an extension leaves in a session for the end of the same request, as "remove your cookie too". It outlives
    # the session, and is no data: it alone begins none.
    _messages: ClassVar[Mapping[str, object]] = {}

    # Held while what is stored is read or changed. Made by `_load`, which all others call first: so it is gevent's if
    # that has patched threading. Reentrant: a serializer, a dispose or an owner function may use the session.
    _lock: AbstractContextManager[bool]

    # How it is as long as nobody looks, which is how most requests leave it: so these are made once, not each time.
    _data: dict[str, Any] | None = None  # None: not looked at
    _record: Loaded | None = None  # what the store held when we last read or wrote it; None: nothing
    _stored: dict[str, Raw] | None = None  # its values, encoded; None: not taken apart yet
    _unreadable: Set[str] = frozenset()  # keys that are stored, and not in `_data` because their values cannot be read
    _stored_sid = ""  # its id
    _sid: str | None = None  # the id this session will have once saved; None: not chosen yet
    _new = True
    _known = False  # the browser's cookie is the id of a stored session
    _cleared = False
    _modified = False
    _was_modified = False  # before the last save
    _abandoned = False
    _outage: Exception | None = None  # why it was, if the store failed
    _written = False  # to the store, in this request
    _late = False  # the browser's cookie is an id that was destroyed or rotated away a moment ago
    _refused = False  # a session could not be begun in this request, and the log says so
    _answered = False  # the response has left
    _put_off = False  # a new id is due, and no response can tell it to the browser
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
        self._claimed = sid
        self._policy = policy
        self._request = request
        # Keys that were set, deleted, or whose mutable values were handed out: no other can have changed, and so
        # no other is compared when the session is saved. A dict, for its order.
        self._loose: dict[str, None] = {}

    # -- a mapping ---------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        value = self._load()[key]
        if type(value) not in _IMMUTABLE:
            self._loose[key] = None
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._load()[key] = value
        self._loose[key] = None

    def __delitem__(self, key: str) -> None:
        data = self._load()
        if key in data or key not in self._unreadable:
            del data[key]
        self._unreadable -= {key}
        self._loose[key] = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())

    def __contains__(self, key: object) -> bool:
        return key in self._load()

    def __bool__(self) -> bool:
        """Tell whether there are data; being permanent is none."""
        return self._has_data(self._load())

    def update(self, /, *args: Any, **kwargs: Any) -> None:  # as that of a mapping, in one go
        """Set the keys of a mapping, of pairs of key and value, or of keywords."""
        values = dict(*args, **kwargs)
        if values:
            self._load().update(values)
            self._loose |= dict.fromkeys(values)

    def __ior__(self, other: Mapping[str, Any]) -> Session:
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._load())

    def __repr__(self) -> str:
        # Tools that check or report a request print all of it: that must read nothing.
        return f"<{type(self).__name__} {'not read yet' if self._data is None else self._data!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plain dicts: a request has one session."""
        return dict, (self.copy(),)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or the default."""
        value = self._load().get(key, _MISSING)  # no `except KeyError`: opening the store may raise one
        if value is _MISSING:
            return default
        if type(value) not in _IMMUTABLE:
            self._loose[key] = None
        return value

    def pop(self, key: str, default: Any = _MISSING) -> Any:
        """Remove a key; return its value, or the default if there is one and the key is missing."""
        data = self._load()
        if default is not _MISSING and key not in data:
            if key in self._unreadable:
                del self[key]  # what is stored goes, though it cannot be returned
            return default
        value = data.pop(key) if default is _MISSING else data.pop(key, default)
        self._loose[key] = None
        return value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, after setting it if it is missing."""
        value = self._load().setdefault(key, default)  # in one step: of two threads only one sets it
        self._loose[key] = None
        return value

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self) | dict(other)

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(other) | dict(self)

    def copy(self) -> dict[str, Any]:
        """Return the data as a dict of their own."""
        data = dict(self._load())
        self._loose |= dict.fromkeys(data)
        return data

    def clear(self) -> None:
        """Remove all data. If the session is still empty when it is saved, it is destroyed."""
        data, blank = self._load(), self._blank()
        with self._lock:
            self._loose |= dict.fromkeys([*data, *self._unreadable, *blank])
            self._unreadable = frozenset()
            data.clear()
            data.update(blank)
            self._cleared = True

    # -- what it is --------------------------------------------------------------------------------

    @property
    def sid(self) -> str:
        """The id: the browser's if that is a stored session, else a new one. After `rotate` the next one."""
        self._load()
        with self._lock:
            sid = self._sid
            if sid is None:
                sid = self._sid = self._policy.new_id()
            return sid

    @property
    def new(self) -> bool:
        """Whether this request began the session."""
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
        Whether this request has changed the session, saved or not. Found by comparison, changes deep inside values
        included.

        Setting it is never needed for that; it makes the next `save` send the cookie again.
        """
        data = self._data
        if data is None:
            return False
        with self._lock:
            return self._modified or self._was_modified or any(self._changes(data.copy()))

    @modified.setter
    def modified(self, value: bool) -> None:
        self._load()
        self._modified = bool(value)
        self._was_modified &= self._modified

    # -- what one can do with it -------------------------------------------------------------------

    def save(self, *, refresh: bool = False, final: bool = False) -> bool:
        """
        Write what has changed since the session was read or last saved.

        Args:
            refresh: Send the cookie of a permanent session again even if nothing has changed.
            final: For a framework's glue: the response leaves after this save.

        Returns:
            False if nothing is stored of what the session holds: another request has destroyed or rotated it
            meanwhile (or just before, and this one came with the old id); it would begin where no response can tell the
            browser; or the store was not there and `on_error` is "anonymous". No cookie is sent then, and the log says
            which of these it was.

        Raises:
            StoreUnavailable: The store cannot be reached and `on_error` is "raise".
            SerializationError: A value cannot be stored. What was stored before is still there.
            RecordTooLarge: The session has grown too large. What was stored before is still there.
        """
        if self._data is None:
            self._answered |= final
        data = self._data  # only now: a thread that looks from here on finds that the response has left
        if data is None:
            return not self._abandoned
        with self._lock:
            held = not self._abandoned
            if held:
                try:
                    held = self._write(data.copy(), refresh)  # what other threads put in from here on comes next time
                except _NO_STORE as error:
                    self._do_without(error)
                else:
                    if not held and self._record is not None:  # if it could not be begun, a login still can begin it
                        self._discard()
            self._answered |= final
            return held and not self._abandoned

    def rotate(self) -> None:
        """
        Give the session a new id when it is saved, and keep its data. The old id is worth nothing then.

        If no response can tell the browser, the next request that has one does it.
        """
        self._load()
        with self._lock:
            if self._can_reply():
                self._sid = self._policy.new_id()
            else:
                self._put_off = True

    def regenerate(self) -> None:
        """End the session and begin a new, empty one under a new id. It is stored once there are data."""
        self.destroy()

    def destroy(self) -> bool:
        """
        End the session, at once. What is put in afterwards begins a new one under a new id.

        Returns:
            Whether there was one to end. If another request of this browser was faster it may have given it a newer
            cookie: ours then says nothing, and only a login begins a new session here.
        """
        self._load()
        with self._lock:
            ended = self._end()
            self._late |= self._abandoned and self._record is None  # it is not known what the browser has
            self._abandoned, self._outage = False, None
            self._forget()
            return ended

    def destroy_others(self) -> int:
        """
        Log out the other devices: end all other sessions of the user whose session this is, in the whole store.

        Who that is, is what `SESSION_OWNER_KEY` finds in the session now, saved or not.

        Returns:
            How many have ended. 0 if nobody is logged in, with a line in the log; and if this session itself has ended
            before, or has got another id by an overlapping request. One that changes the id during the call waits.

        Raises:
            ConfigError: `SESSION_OWNER_KEY` is None: sessions have no owners.
            StoreUnavailable, StoreFull: The store cannot be reached, or failed earlier in this request, whatever
                `on_error` is: some may not have ended.
        """
        if not self._policy.has_owners:
            raise ConfigError("destroy_others() needs to know whose a session is: set SESSION_OWNER_KEY")
        data = self._load()
        with self._lock:
            if self._outage is not None:  # so it is not known who is logged in
                raise self._outage
            owner = self._policy.owner(data.copy())
            if owner is None and (times := _ownerless.due()):
                logger.warning(
                    "%d calls of destroy_others() ended nothing: SESSION_OWNER_KEY finds no user in the session", times
                )
            if owner is None or self._abandoned:
                return 0
            store, key = self._store(), self._key(self._stored_sid)
            if self._record is None:
                return store.destroy_owned(owner)
            with store.lock(_id_of(key)):
                if key in store:
                    return store.destroy_owned(owner, [key, self._key(self.sid)])
            self._discard()
            return 0

    def reload(self) -> bool:
        """
        Read the session again, and forget what has not been saved.

        Returns:
            Whether it is stored. If it was and is no more, it is empty now and will save nothing.
        """
        data, after = self._load(), None
        with self._lock:
            if self._record is not None:
                after = self._attempt(lambda: self._fetch(self._stored_sid), None)
                if after is None:
                    self._discard()
            there = self._blank() if after is None else after
            for key in list(data):  # not all at once: other threads may be reading it
                if key not in there:
                    data.pop(key, None)
            data.update(there)
            self._cleared = self._modified = False
            return after is not None

    def touch(self) -> bool:
        """
        Renew the session's life now. A request that looks at its session does so anyway when it is time.

        Returns:
            Whether the session is stored.
        """
        self._load()
        with self._lock:
            record = self._record
            if record is None or self._abandoned:
                return False
            life = self._policy.life(record.created)
            if not self._attempt(lambda: self._store().touch(self._key(self._stored_sid), ttl=life), True):
                self._discard()
            self._record = record._replace(remaining=life)
            return not self._abandoned

    @contextmanager
    def lock(self, timeout: Duration = 5.0) -> Iterator[None]:
        """
        Take turns with the other requests that do so: for a value that is read, changed and written back.

        The session is read again when the turn comes, and saved when it ends; if an exception ends it, all that was
        changed in the session meanwhile is forgotten, also what other threads of this request have put in and have not
        saved. Requests that do not ask for a turn are not held up. It ends with its process.

        Args:
            timeout: How long to wait for it; seconds or timedelta.

        Raises:
            StoreTimeout: It did not come.
        """
        self._load()
        self.save()
        known = self._record is not None  # else nobody else can want a turn
        with self._store().lock(self._key(self._stored_sid), timeout) if known else nullcontext():
            with self._lock:
                if known:
                    self.save()  # what other threads of this request have put in while this one waited
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
            with self.__dict__.setdefault("_lock", threading.RLock()):  # in one step: of two threads only one makes it
                data = self._data
                if data is None:
                    data = self._data = self._read()
        return data

    def _read(self) -> dict[str, Any]:
        self.accessed = True
        claimed = (self._claimed,) if isinstance(self._claimed, str) else self._claimed or ()
        tried: list[str] = []
        try:
            for sid in claimed:
                if not sid or sid in tried or not self._policy.is_id(sid):
                    continue  # none, of another application, or invented
                data = self._fetch(sid)
                if data is not None:
                    self._new, self._known = False, True
                    return data
                tried.append(sid)
                if len(tried) == _MOST_COOKIES:
                    break
            self._late = any(self._is_stale(sid) for sid in tried)
        except _NO_STORE as error:
            self._do_without(error)
        return self._policy.blank()

    def _fetch(self, sid: str) -> dict[str, Any] | None:
        """Read what is stored under an id, and take it for this session's own."""
        store, key = self._store(), self._key(sid)
        record = store.load(key)
        if record is not None and self._policy.spent(record):
            store.touch(key, ttl=0)  # expired; destroying it would make its visitor one who comes late
            record = None
        self._record = self._stored = self._sid = None
        self._put_off = False
        self._unreadable = frozenset()
        if record is None:
            return None
        try:
            data = store.codec.decode(record.payload)
        except SerializationError:
            try:
                data, self._unreadable = store.codec.salvage(record.payload)
                for key in self._unreadable:
                    self._loose.pop(key, None)
            except SerializationError as error:
                if times := _damaged.due():
                    logger.error(  # noqa: TRY400
                        "%s: %d stored sessions are damaged: their visitors begin new ones: %s",
                        store.label, times, outline(error.__cause__ or error),
                    )  # fmt: skip
                return None
        self._record = record
        self._sid = self._stored_sid = sid
        if data.pop(_ROTATE, False) and self._can_reply():
            self._sid = self._policy.new_id()
            self._loose[_ROTATE] = None
        return data

    def _can_reply(self) -> bool:
        """Tell whether there is a response that can still give the browser another id."""
        return not self._answered

    def _navigates(self) -> bool:
        """Tell whether this request is for a whole page, in place of the one that the browser shows."""
        return False

    def _is_stale(self, sid: str) -> bool:
        """Tell whether the browser may hold a newer cookie than the one with this id, which the store does not know."""
        navigates = self._navigates()
        within = _STALE_NAVIGATION_AFTER if navigates else _STALE_AFTER
        return self._store().gone(self._key(sid), within, renamed=navigates)

    def _changes(self, data: dict[str, Any], attempts: int = _ATTEMPTS) -> tuple[dict[str, Raw], list[str]]:
        """Tell the keys whose encoded values are not the stored ones, and those that are stored no more."""
        record = self._record
        changed: dict[str, Raw] = {}
        removed: list[str] = []
        try:
            if record is None:
                codec = self._store().codec
                changed = codec.raws(codec.encode(data))
            elif self._loose:
                codec = self._store().codec
                if self._stored is None:
                    self._stored = codec.raws(record.payload)
                for key in list(self._loose):
                    if key not in data:
                        if key in self._stored:
                            removed.append(key)
                    elif (raw := Raw(codec.encode_value(key, data[key]))) != self._stored.get(key):
                        changed[key] = raw
        except (SerializationError, RuntimeError) as error:
            pass_on_interruption(error)
            # Python's "changed size during iteration": another thread is just changing a value.
            cause = error.__cause__ or error
            if attempts == 1 or not isinstance(cause, RuntimeError) or isinstance(cause, RecursionError):
                raise
            return self._changes(data, attempts - 1)
        return changed, removed

    # -- writing -----------------------------------------------------------------------------------

    def _write(self, data: dict[str, Any], refresh: bool) -> bool:
        """Bring the store up to date; False if the session is not there any more."""
        record, policy = self._record, self._policy
        if record is None and not self._has_data(data):
            return True
        owner = policy.owner(data)
        if record is not None and self._unreadable:
            owner = self._settle_unreadable(data, owner, record)
        changed, removed = self._changes(data)
        if record is None:
            return self._may_begin(owner) and self._create(changed, owner)

        ends = self._cleared or owner != record.owner
        if ends and (changed or removed) and not self._has_data(data) and not self._unreadable:
            self._end()
            self._detach()
            self._was_modified = True
            return True
        if owner != record.owner and self._sid == self._stored_sid and self._is_another_user(owner, record):
            self.rotate()  # an id somebody planted before the login must be worth nothing after it
        if self._put_off:
            changed[_ROTATE] = Raw(self._store().codec.encode_value(_ROTATE, True))
            self._put_off = False

        life = policy.life(record.created)
        rotated = self._sid != self._stored_sid
        permanent = bool(data.get(PERMANENT))
        resend = self._modified or (refresh and permanent)
        if rotated or changed or removed or owner != record.owner:
            held = self._replace(data, changed, removed, life, KEEP if owner == record.owner else owner)
            resend |= rotated or permanent or PERMANENT in changed or PERMANENT in removed
        elif policy.touch_due(record, life):
            held = self._store().touch(self._key(self._stored_sid), ttl=life)
        else:
            return not resend or self._confirm()
        if not held:
            if (changed or removed) and (times := _dropped.due()):
                logger.warning(
                    "%s: %d saves dropped: another request had ended the session, or given it another id",
                    self._store().label, times,
                )  # fmt: skip
            return False

        self._saved(changed, removed, Loaded(record.payload, record.created, record.idle, life, owner))
        if resend and self._can_reply():
            self._cookie = Cookie.SEND
        if removed and not self._has_data(data):
            self._discard_if_empty()
        return True

    def _settle_unreadable(self, data: dict[str, Any], owner: str | None, record: Loaded) -> str | None:
        """Mark those unreadable values for removal that must not outlive a change of the user; return the owner."""
        self._unreadable -= self._loose.keys()  # replaced or deleted
        goes = set[str]()
        if owner is None:
            tells = {key for key in self._unreadable if self._policy.may_tell_owner(key)}
            if tells and not self._logs_out(data):
                return record.owner
            goes = tells
        elif record.owner not in (None, owner) and self._is_another_user(owner, record):
            goes = set(self._unreadable)
        self._unreadable -= goes
        self._loose |= dict.fromkeys(goes)
        return owner

    def _logs_out(self, data: dict[str, Any]) -> bool:
        """Tell whether this request has logged out a user whose key cannot be read, and so could not be removed."""
        return False

    def _is_another_user(self, owner: str | None, record: Loaded) -> bool:
        """Tell whether the user has changed in this request, and not only the rule for who that is."""
        if self._written:
            return True
        codec, policy = self._store().codec, self._policy
        read = codec.readable(record.payload)
        before = policy.owner(read)
        if before is None and any(map(policy.may_tell_owner, codec.fields(record.payload).keys() - read.keys())):
            before = record.owner
        return before != owner

    def _may_begin(self, owner: str | None) -> bool:
        """Tell whether a session can be begun, and say so if not."""
        if not self._can_reply():
            if not self._refused and (times := _unheard.due()):
                logger.warning(
                    "%s: %d sessions begun where no response can tell the browser are not kept",
                    self._store().label, times,
                )  # fmt: skip
            self._refused = True
            return False
        # A stale request must not put a cookie over the newer one that the browser may hold by now.
        if self._late and not self._logs_in(owner):
            if not self._refused and (times := _stale.due()):
                logger.warning(
                    "%s: %d sessions not begun by requests with an id that another request had just replaced",
                    self._store().label, times,
                )  # fmt: skip
            self._refused = True
            return False
        return True

    def _replace(
        self, data: dict[str, Any], changed: dict[str, Raw], removed: list[str], life: float, owner: NewOwner
    ) -> bool:
        """Write changes, under another id if one was chosen; False if the session is not there any more."""
        store, key = self._store(), self._key(self._stored_sid)
        lists = self._lists.intersection([*changed, *removed])
        if not lists:
            return self._put_changes(store, key, changed, removed, life, owner)
        with store.lock(f"lists {key}"):
            for name in lists:
                self._merge_list(name, data, changed, removed)
            return self._put_changes(store, key, changed, removed, life, owner)

    def _put_changes(
        self, store: AnyStore, key: str, changed: dict[str, Raw], removed: list[str], life: float, owner: NewOwner
    ) -> bool:
        if self._sid != self._stored_sid:
            with store.lock(_id_of(key)):
                return store.rename(key, self._key(self.sid), changed, removed, ttl=life, owner=owner, tombstone=True)
        return store.update(key, changed, removed, ttl=life, owner=owner)

    def _merge_list(self, name: str, data: dict[str, Any], changed: dict[str, Raw], removed: list[str]) -> None:
        """Add to our list what another request has added since we read it; leave out what either has taken out."""
        store = self._store()
        record = store.load(self._key(self._stored_sid))
        stored = self._stored or {}
        raw = store.codec.raws(record.payload).get(name) if record else None
        if raw == stored.get(name):
            return
        try:
            before, theirs = (store.codec.decode_value(each) if each else [] for each in (stored.get(name), raw))
        except SerializationError:
            return  # it cannot be read: ours replaces it
        ours = data.get(name, [])
        if not isinstance(before, list) or not isinstance(theirs, list) or not isinstance(ours, list):
            return
        now = list(ours)
        kept = theirs if _begins(now, before) else _added(theirs, before)
        added = _added(now, before)
        if kept or added:
            # In place, for another thread may be adding to it.
            live = ours if name in data else self._load().setdefault(name, [])
            live[: len(now) - len(added)] = kept
            changed[name] = Raw(store.codec.encode_value(name, kept + added))
            removed[:] = [each for each in removed if each != name]

    def _logs_in(self, owner: str | None) -> bool:
        """Tell whether a visitor has proved in this request who they are: they get a session even if they come late."""
        return owner is not None

    def _create(self, values: dict[str, Raw], owner: str | None) -> bool:
        life = self._policy.life(0)
        while not self._store().add(self._key(self.sid), values, ttl=life, owner=owner):
            self.rotate()
        self._saved(values, [], Loaded(b"", 0, 0, life, owner))
        self._cookie = Cookie.SEND
        return True

    def _saved(self, changed: dict[str, Raw], removed: list[str], record: Loaded) -> None:
        """Remember what the store holds now. `_loose` stays: who was handed a value may change it again."""
        self._written = True
        self._was_modified |= self._modified or bool(changed or removed)
        self._record, self._stored_sid = record, self.sid
        if self._stored is None and not record.payload:  # it has just been begun
            self._stored = {}
        if self._stored is not None:
            self._stored.update(changed)
            for key in removed:
                self._stored.pop(key, None)
        self._cleared = self._modified = False

    def _confirm(self) -> bool:
        """Send the cookie again, if the session is still there: else the browser may hold a newer one by now."""
        if self._key(self._stored_sid) not in self._store():
            return False
        self._was_modified |= self._modified
        self._modified = False
        if self._can_reply():
            self._cookie = Cookie.SEND
        return True

    def _discard_if_empty(self) -> None:
        """Destroy the session if this request took out the last key, and no other has put one in."""
        store, can_reply = self._store(), self._can_reply()
        if store.destroy_if_empty(self._key(self._stored_sid), [PERMANENT], tombstone=can_reply):
            self._detach()
            self._cookie = Cookie.DELETE if self._known and can_reply else Cookie.KEEP

    def _discard(self) -> None:
        """Save nothing more, and send no cookie over a newer one: another request has ended the session."""
        self._abandoned, self._cookie = True, Cookie.KEEP

    def _end(self) -> bool:
        """End the stored session; return whether there was one."""
        if self._record is None:
            return False
        ended = self._attempt(self._destroy_stored, False)
        self._cookie = Cookie.DELETE if ended and self._known and self._can_reply() else Cookie.KEEP
        return ended

    def _destroy_stored(self) -> bool:
        store, key = self._store(), self._key(self._stored_sid)
        # Without a response there is no newer cookie that a stale request could overwrite.
        if store.destroy(key, tombstone=self._can_reply()):
            return True
        self._late = store.gone(key)  # however long ago that was: this request had begun before
        return False

    def _forget(self) -> None:
        """Be a new session."""
        data, blank = self._load(), self._blank()
        data.clear()
        data.update(blank)
        self._detach()

    def _detach(self) -> None:
        """Be a new session with the data that there are: those that another thread has just put in, if any."""
        self._record = self._stored = self._sid = None
        self._unreadable = frozenset()
        self._new = True
        self._put_off = self._cleared = self._modified = False

    def _blank(self) -> dict[str, Any]:
        """Return what is left when all data go: what is for the end of this request stays."""
        data = self._load()
        return self._policy.blank() | {key: each for key, each in self._messages.items() if data.get(key) == each}

    def _has_data(self, data: dict[str, Any]) -> bool:
        """Tell whether there are data: neither being permanent nor what is for the end of this request is."""
        messages = self._messages
        if len(data) > len(messages) + 1:
            return True
        return any(key != PERMANENT and (key not in messages or messages[key] != data[key]) for key in data)

    def _attempt(self, work: Callable[[], T], otherwise: T) -> T:
        """Do something that needs the store; if that cannot be reached, give up on it for this request."""
        try:
            return work()
        except _NO_STORE as error:
            self._do_without(error)
            return otherwise

    def _do_without(self, error: Exception) -> None:
        """Give up on the store for this request, after an error: raise that, or go on."""
        self._abandoned, self._outage = True, error
        if self._data is None:
            # One error is enough: the page that reports it finds an empty session, and does not wait too.
            self._data = self._policy.blank()
        if self._policy.on_error == "raise":
            raise error
        if times := _unavailable.due():
            logger.warning("the store of the sessions is not available: %d requests go on without: %s", times, error)

    def _key(self, sid: str) -> str:
        return self._policy.key_prefix + sid


def cookie_of(session: Session) -> Cookie:
    """Tell a framework's glue what the response must say about the cookie; to be asked after `Session.save`."""
    return session._cookie


def abandon(session: Session) -> None:
    """Save nothing more: for a framework's glue that is about to report a failed save."""
    session._abandoned = True


def _id_of(key: str) -> str:
    """Name the lock of who changes the id of a session, or ends its owner's others and must know which one to keep."""
    return f"id {key}"


def _begins(whole: list[Any], part: list[Any]) -> bool:
    return whole[: len(part)] == part


def _added(after: list[Any], before: list[Any]) -> list[Any]:
    """Return what is new in a list; if what was in it before is gone, all is."""
    return after[len(before) :] if _begins(after, before) else after
