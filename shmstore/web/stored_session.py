"""
How the session of a request is read from its store, and how it is written back. Private: `shmstore.session` is public.

A read: `_read` tries the ids of the cookie; `_fetch` loads and decodes one.

A write: `_write` encodes the session and compares it with what is stored. If it is new, `_create` stores it. If it is
unchanged, `_renew` renews its ttl if that is due. If it has changed, `_swap` writes it as a whole, also under another
id. If another request has changed it too, `_merge` writes the changed keys to what the other request has stored.

A login: the data has another owner than the stored session. `_rotate_if_user_changed` chooses a new id, and `_swap` or
`_merge` moves the session to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar

from msgspec import Raw

from shmstore.codec.body import Codec
from shmstore.codec.ids import AT_NAVIGATION, ROTATE
from shmstore.contract import KEEP, AnyStore, Loaded, NewOwner, new_loaded
from shmstore.errors import SerializationError, StoreFull, StoreUnavailable, safe_traceback
from shmstore.policy import PERMANENT, STALE_AFTER, Policy
from shmstore.system.blocking import blocking_allowed
from shmstore.system.lazy_dict import LazyDict
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle
from shmstore.web.cookie import KEEP_COOKIE, Cookie

__all__ = ["STORE_ERRORS", "StoredSession", "id_lock_name"]

logger = logging.getLogger("shmstore")

# How many ids from one request are looked up. Each costs a read, and a client can send hundreds. A browser has several
# cookies with one name only if they differ in domain or path.
_MAX_COOKIES = 8

# Errors after which a request can continue without a session, if `on_error` is "anonymous".
STORE_ERRORS = (StoreUnavailable, StoreFull)

# `STALE_AFTER` of navigations. One cancels the previous one together with its response, so a newer cookie is rarely
# still in transit. If the session was removed, that response deletes the cookie and sets none, so a navigation may
# start a session at once.
_STALE_NAVIGATION_AFTER: Final = 1.0

_NO_LOCK: Final = nullcontext()
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_NO_KEYS: Final[frozenset[str]] = frozenset()

_ENCODE_ATTEMPTS: Final = 10  # to encode values that other threads keep changing
_SWAP_ATTEMPTS: Final = 10  # to overwrite a session that other requests keep changing

_unavailable, _damaged, _unanswerable, _planted, _stale, _dropped = (Throttle() for _ in range(6))

T = TypeVar("T")


class StoredSession(LazyDict):
    """
    A session in a store, as one request has read it and changes it.

    Attributes:
        accessed: Whether the response may depend on the session and therefore needs ``Vary: Cookie``.
    """

    __slots__ = (
        "_cleared",
        "_cookie",
        "_cookie_sids",
        "_cookie_valid",
        "_creation_refused",
        "_discarded",
        "_drop_logged",
        "_emptied",
        "_modified",
        "_new",
        "_partial",
        "_policy",
        "_read_ahead",
        "_read_data",
        "_record",
        "_request",
        "_response_sent",
        "_rotation_pending",
        "_sid",
        "_stale_cookie",
        "_store",
        "_store_error",
        "_stored_sid",
        "_unreadable",
        "_was_modified",
        "_was_written",
        "accessed",
    )  # fmt: skip

    # Keys of lists whose concurrent appends are merged.
    _merged_lists: ClassVar[frozenset[str]] = frozenset()

    # Values that an extension leaves in a session for the end of the same request, such as "remove your cookie too".
    # They survive `clear` and do not count as data: they alone create no session.
    _markers: ClassVar[Mapping[str, object]] = {}

    # Moves the session that another extension has stored under an id into the store, if there is one.
    _migrate: Callable[[str], None] | None = None

    _content = dict[str, Any].copy  # returns the data as it is stored

    def __init__(
        self,
        store: Callable[[], AnyStore],
        sid: str | Sequence[str] | None,
        policy: Policy,
        *,
        request: Any = None,
    ) -> None:
        super().__init__()
        self._store = store
        self._cookie_sids = sid
        self._policy = policy
        self._request = request
        self.accessed = False
        # What is stored.
        self._record: Loaded | None = None  # what the store held at the last read or write; None: nothing
        self._stored_sid = ""  # the id that `_record` is stored under
        self._read_data: Mapping[str, Any] = _NOTHING  # as it was read; a value may have been changed in place
        self._unreadable: frozenset[str] = _NO_KEYS  # stored keys that are missing here: their values are unreadable
        self._partial = False  # keys of `_record` are, or were, hidden from views: unreadable ones, or `ROTATE`
        self._read_ahead: dict[str, Any] | Exception | None = None  # the outcome of a read before the first access
        # What this request has done.
        self._sid: str | None = None  # the id of this session after the next save; None: not chosen yet
        self._rotation_pending = False  # a new id is due, and no response can set it
        self._new = True
        self._cleared = self._modified = False
        self._was_modified = False  # before the last save
        self._was_written = False  # this request has written it to the store
        self._emptied = False  # this request has removed the last key from the store, and the session may have to end
        self._discarded = False  # nothing more is saved in this request
        self._drop_logged = False  # changes were not saved, and that was logged
        self._store_error: Exception | None = None  # the failure of the store after which it was discarded
        # The cookie.
        self._cookie = KEEP_COOKIE  # what the response does with it
        self._cookie_valid = False  # the browser's holds the id of a stored session
        self._stale_cookie = False  # the browser's holds an id that was destroyed or rotated a moment ago
        self._creation_refused = False  # this request could not create a session, and that was logged
        self._response_sent = False

    # -- reading -----------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        self.accessed = True
        data = self._read_ahead
        if data is None:
            try:
                data = self._find()
            except STORE_ERRORS as error:
                data = error
        if isinstance(data, dict):
            return data
        self._degrade(data)
        return self._policy.initial_data()

    def _find(self) -> dict[str, Any]:
        """Read the session that the cookie names, without an access; return its data, or those of a new session."""
        sids = self._cookie_sids
        tried: list[str] = []
        for sid in (sids,) if isinstance(sids, str) else sids or ():
            if sid in tried or not self._policy.is_id(sid):
                continue  # empty, tried, or malformed: another application's or invented
            data = self._fetch(sid)
            if data is None and self._migrate is not None:
                self._migrate(sid)
                data = self._fetch(sid)
            if data is not None:
                self._new, self._cookie_valid = False, True
                return data
            tried.append(sid)
            if len(tried) == _MAX_COOKIES:
                break
        if tried:
            self._stale_cookie = any(map(self._is_stale, tried))
        self._cookie_sids = tried  # for `_was_logged_out`: those that were checked
        return self._policy.initial_data()

    def _fetch(self, sid: str) -> dict[str, Any] | None:
        """Read the session stored under an id and adopt it; return its data, or None if it is not stored."""
        store, key = self._store(), self._policy.key_prefix + sid
        record = store.load(key)
        if record is not None and self._policy.past_limits(record):
            store.touch(key, ttl=0)  # expire it; destroying it would leave a tombstone and make the request stale
            record = None
        self._record = self._sid = None
        self._partial = self._rotation_pending = False
        self._unreadable = _NO_KEYS
        if record is None:
            return None
        try:
            data = store.codec.decode(record.payload)
        except SerializationError:
            try:
                data, unreadable = store.codec.salvage(record.payload)
                self._unreadable, self._partial = frozenset(unreadable), True
            except SerializationError as error:
                if times := _damaged.due():
                    logger.error(  # noqa: TRY400
                        "%s: damaged sessions, whose visitors start new ones: %d; the last: %s",
                        store.label, times, safe_traceback(error.__cause__ or error),
                    )  # fmt: skip
                return None
        self._record = record
        self._sid = self._stored_sid = sid
        self._read_data = data
        if ROTATE in data:
            can_wait = data.pop(ROTATE) == AT_NAVIGATION and self._is_subrequest()
            self._partial = True
            if self._can_set_cookie() and not can_wait:
                self._sid = self._policy.new_id()
        return data

    def _next_sid(self) -> str:
        """Return the id after the next save."""
        sid = self._sid
        if sid is None:
            sid = self._sid = self._policy.new_id()
        return sid

    def _choose_new_id(self) -> None:
        """Choose another id for the next save, or put that off to a request whose response can set it."""
        if self._can_set_cookie():
            self._sid = self._policy.new_id()
        else:
            self._rotation_pending = True

    def _can_set_cookie(self) -> bool:
        """Return whether there is a response that can still set the cookie."""
        return not self._response_sent

    def _header(self, name: str) -> str | None:
        """Return a header of the request, named in lower case; None: it is absent."""
        return None

    def _is_navigation(self) -> bool:
        """
        Return whether this request is a navigation: for a whole page that replaces the displayed one.

        A navigation in a frame, or a prefetch, does not cancel another request.
        """
        return (
            self._header("sec-fetch-mode") == "navigate"
            and self._header("sec-fetch-dest") in ("document", None)
            and self._header("sec-purpose") is None
        )

    def _is_subrequest(self) -> bool:
        """Return whether this request is known to be made by a page, for a part of it or by its script."""
        return self._header("sec-fetch-mode") not in ("navigate", None)

    def _is_stale(self, sid: str) -> bool:
        """Return whether the browser may hold a newer cookie than the one with this id, which the store lacks."""
        is_navigation = self._is_navigation()
        within = _STALE_NAVIGATION_AFTER if is_navigation else STALE_AFTER
        return self._store().gone(self._store_key(sid), within, renamed=is_navigation)

    # -- writing -----------------------------------------------------------------------------------

    def _write(self, refresh: bool, attempts: int = _SWAP_ATTEMPTS) -> bool:
        """Update the store; return False if the session is not stored any more, or must not be stored."""
        if self._emptied:
            self._end_if_empty()
        data = self._content()  # later changes of other threads are for the next save
        record, policy = self._record, self._policy
        if record is None and not self._has_data(data):
            return True
        owner = policy.owner(data)
        if record is None:
            return self._may_create(owner) and self._create(data, owner)
        overwrites = self._cleared and self._has_data(data)
        if overwrites:
            record = self._stored_now(record)
        if self._sid != self._stored_sid and not self._can_set_cookie():  # it was chosen before the response was sent
            self._sid, self._rotation_pending = self._stored_sid, not self._waits_for_rotation(record)
        same_owner = owner == record.owner
        if not (same_owner or owner is None or self._can_set_cookie()) and self._user_has_changed(owner, record):
            self._log_refused_login()
            return False

        store = self._store()
        codec = store.codec
        payload = self._encode(codec, data)
        life = policy.remaining_ttl(record.created)
        resend = self._modified or (refresh and bool(data.get(PERMANENT)))
        hidden = self._partial and not (self._cleared and self._sid != self._stored_sid)
        whole = not (hidden or self._rotation_pending)  # else the store has keys that `data` lacks
        if whole and same_owner and payload == record.payload and self._sid == self._stored_sid:
            stored = self._renew(record, life, resend)
        else:
            change = record, data, payload, owner, life, resend
            whole = whole and codec.is_deterministic
            stored = whole and self._swap(store, *change)
            if not stored and whole and overwrites and attempts > 1 and not self._rotation_pending:
                return self._write(refresh, attempts - 1)
            stored = stored or self._merge(*change)
        if not stored:
            self._discard()
        return stored

    def _stored_now(self, known: Loaded) -> Loaded:
        """Return what the store holds now: after `clear` it is overwritten. A rotation that waits there is due."""
        now = self._store().load(self._store_key(self._stored_sid)) or known
        self._record = now
        if self._waits_for_rotation(now) and not self._waits_for_rotation(known) and self._sid == self._stored_sid:
            self._choose_new_id()
        return now

    def _waits_for_rotation(self, record: Loaded) -> bool:
        return ROTATE in self._store().codec.fields(record.payload)

    def _swap(
        self,
        store: AnyStore,
        record: Loaded,
        data: dict[str, Any],
        payload: bytes,
        owner: str | None,
        life: float,
        resend: bool,
    ) -> bool:
        """
        Write the whole session in one step, under its next id if that is another; return whether it was written.

        False: another request has changed the session since it was read, or the change is one that only `_merge` makes.
        """
        if record.handle is None or not self._has_data(data):
            return False
        if owner != record.owner:
            self._rotate_if_user_changed(owner, record)
            if self._rotation_pending:
                return False
        key, new, lock = self._store_key(self._stored_sid), None, None
        if self._sid != self._stored_sid:
            new = self._store_key(self._next_sid())
            if record.owner is not None:
                lock = id_lock_name(key)
        before = self._read_data
        for name in () if self._cleared else self._merged_lists:  # other requests may append to these
            if name in data or name in before:
                if lock is not None:
                    return False
                lock = _list_lock_name(key)
                break
        if lock is None:
            swapped = store.swap(key, record, payload, life, owner, new, new is not None)
        else:
            with store.lock(lock):
                swapped = store.swap(key, record, payload, life, owner, new, new is not None)
        if not swapped:
            return False
        self._mark_saved(
            new_loaded((payload, record.created, record.idle, life, owner, None)), payload != record.payload
        )
        permanent = data.get(PERMANENT)
        if resend or new is not None or permanent or permanent != before.get(PERMANENT):
            self._send_cookie()
        return True

    def _renew(self, record: Loaded, life: float, resend: bool) -> bool:
        """Renew the ttl of an unchanged session if that is due, and its cookie; return False if it is not stored."""
        due = abs(life - record.remaining) >= self._policy.touch_after  # enough to be worth a write
        if not (due or resend):
            return True
        store, key = self._store(), self._store_key(self._stored_sid)
        if not (store.touch(key, ttl=life) if due else key in store):  # the browser may hold a newer cookie
            return False
        if due:
            self._mark_saved(record._replace(remaining=life), False)
        if resend:
            self._was_modified |= self._modified
            self._modified = False
            self._send_cookie()
        return True

    def _merge(
        self, record: Loaded, data: dict[str, Any], payload: bytes, owner: str | None, life: float, resend: bool
    ) -> bool:
        """Write the keys that have changed, to the session as it is stored now; return False if it is not stored."""
        unreadable = self._unreadable
        if unreadable:
            owner, unreadable = self._resolve_unreadable(unreadable.difference(data), owner, record, data)
        changed, removed = self._changes(record, payload, unreadable)
        ends = self._cleared or owner != record.owner
        if ends and (changed or removed) and not self._has_data(data) and not unreadable:
            self._destroy_stored_session()
            self._detach()
            self._was_modified = True
            return True
        self._rotate_if_user_changed(owner, record)
        if self._rotation_pending:
            changed[ROTATE] = Raw(self._store().codec.encode_value(ROTATE, True))

        rotated = self._sid != self._stored_sid
        if not (rotated or changed or removed or owner != record.owner):
            return self._renew(record, life, resend)
        if not self._replace(data, changed, removed, life, KEEP if owner == record.owner else owner):
            if changed or removed:
                self._log_dropped_save()
            return False
        stored = self._store().codec.merge(record.payload, changed, removed)
        self._unreadable &= unreadable
        if self._rotation_pending:
            self._rotation_pending, self._partial = False, True
        self._mark_saved(new_loaded((stored, record.created, record.idle, life, owner, None)), bool(changed or removed))
        if resend or rotated or data.get(PERMANENT) or PERMANENT in changed or PERMANENT in removed:
            self._send_cookie()
        if removed and not self._has_data(data):
            self._emptied = True
            self._end_if_empty()
        return True

    def _resolve_unreadable(
        self, unreadable: frozenset[str], owner: str | None, record: Loaded, data: dict[str, Any]
    ) -> tuple[str | None, frozenset[str]]:
        """Return the owner, and the unreadable keys without those that must not survive a change of user."""
        if owner is None:
            candidates = {key for key in unreadable if self._policy.may_determine_owner(key)}
            if candidates and not self._is_logout(data, record):
                return record.owner, unreadable
            return owner, unreadable - candidates
        if record.owner not in (None, owner) and self._user_has_changed(owner, record):
            return owner, frozenset()
        return owner, unreadable

    def _is_logout(self, data: dict[str, Any], record: Loaded) -> bool:
        """Return whether this request logged out a user whose key is unreadable and so could not be removed."""
        return False

    def _rotate_if_user_changed(self, owner: str | None, record: Loaded) -> None:
        """Change the id if the user has changed: an id planted before a login must be invalid after it (fixation)."""
        if owner != record.owner and self._sid == self._stored_sid and self._user_has_changed(owner, record):
            self._choose_new_id()

    def _user_has_changed(self, owner: str | None, record: Loaded) -> bool:
        """Return whether the user has changed in this request, and not only the rule that determines the owner."""
        if self._was_written:
            return True
        codec, policy, read = self._store().codec, self._policy, self._read_data
        if not policy.owner_is_immutable(read):
            read = codec.readable(record.payload)
        before = policy.owner(read)
        if before is None and self._partial:
            unreadable = codec.fields(record.payload).keys() - read.keys()
            before = record.owner if any(map(policy.may_determine_owner, unreadable)) else None
        return before != owner

    def _log_dropped_save(self) -> None:
        """Log, once in a request, that changes are not stored."""
        if not self._drop_logged and (times := _dropped.due()):
            logger.warning(
                "%s: saves dropped: %d; another request had destroyed the session or changed its id",
                self._store().label, times,
            )  # fmt: skip
        self._drop_logged = True

    def _log_refused_login(self) -> None:
        """Log that a login is not stored under the id that it came with, which another person may have planted."""
        if times := _planted.due():
            logger.warning(
                "%s: logins not stored: %d; no response can change the id of their session",
                self._store().label, times,
            )  # fmt: skip

    def _may_create(self, owner: str | None) -> bool:
        """Return whether a session can be created; log the reason if not."""
        if not self._can_set_cookie():
            if not self._creation_refused and (times := _unanswerable.due()):
                logger.warning(
                    "%s: new sessions not stored: %d; no response can set their cookie",
                    self._store().label, times,
                )  # fmt: skip
            self._creation_refused = True
            return False
        # A stale request must not overwrite the newer cookie that the browser may already hold.
        if not self._is_login(owner) and (self._stale_cookie or (owner is not None and self._was_logged_out())):
            if not self._creation_refused and (times := _stale.due()):
                logger.warning(
                    "%s: new sessions not stored: %d; another request had just replaced the id in their cookie",
                    self._store().label, times,
                )  # fmt: skip
            self._creation_refused = True
            return False
        return True

    def _encode(self, codec: Codec, data: dict[str, Any], attempts: int = _ENCODE_ATTEMPTS) -> bytes:
        try:
            return codec.encode(data, None if self._record is None else self._record.payload)
        except (SerializationError, RuntimeError) as error:
            if attempts == 1 or not _is_being_changed(error):
                raise
        return self._encode(codec, data, attempts - 1)

    def _changes(self, record: Loaded, payload: bytes, unreadable: Set[str]) -> tuple[dict[str, Raw], list[str]]:
        """Return the keys whose values are not the stored ones, and the stored keys that are to be removed."""
        changed, missing = self._store().codec.changes(record.payload, payload)
        if self._partial:
            rotates = self._sid != self._stored_sid
            missing = [key for key in missing if key not in unreadable and (rotates or key != ROTATE)]
        return changed, missing

    def _replace(
        self, data: dict[str, Any], changed: dict[str, Raw], removed: list[str], life: float, owner: NewOwner
    ) -> bool:
        """Write changes, under another id if one was chosen; return False if the session is not stored any more."""
        store, key = self._store(), self._store_key(self._stored_sid)
        lists = self._merged_lists.intersection([*changed, *removed])
        with (
            store.lock(_list_lock_name(key)) if lists else _NO_LOCK,
            blocking_allowed() if lists else _NO_LOCK,  # lists are merged in place
        ):
            for name in lists:
                self._merge_list(name, data, changed, removed)
            if self._sid == self._stored_sid:
                return store.update(key, changed, removed, ttl=life, owner=owner)
            with store.lock(id_lock_name(key)):
                new = self._store_key(self._next_sid())
                return store.rename(key, new, changed, removed, ttl=life, owner=owner, tombstone=True)

    def _merge_list(self, name: str, data: dict[str, Any], changed: dict[str, Raw], removed: list[str]) -> None:
        """Merge items that another request has appended since the read; leave out items that either has removed."""
        store = self._store()
        record = store.load(self._store_key(self._stored_sid))
        known = self._record
        old, raw = (store.codec.raws(each.payload).get(name) if each else None for each in (known, record))
        if raw == old:
            return
        try:
            before, theirs = (store.codec.decode_value(each) if each else [] for each in (old, raw))
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
            live = ours if name in data else self.setdefault(name, [])
            live[: len(now) - len(appended)] = kept
            changed[name] = Raw(store.codec.encode_value(name, kept + appended))
            removed[:] = [each for each in removed if each != name]

    def _was_logged_out(self) -> bool:
        """Return whether another request has just removed the session, perhaps because its user logged out."""
        if self._cookie_valid:
            return False
        gone, keys = self._store().gone, map(self._store_key, self._cookie_sids or ())
        return any(gone(key, STALE_AFTER) and not gone(key, STALE_AFTER, renamed=True) for key in keys)

    def _is_login(self, owner: str | None) -> bool:
        """Return whether the visitor authenticated in this request: a login gets a session even if it is stale."""
        return owner is not None

    def _create(self, data: dict[str, Any], owner: str | None) -> bool:
        store, life = self._store(), self._policy.remaining_ttl(0)
        payload = self._encode(store.codec, data)
        while not store.add(self._store_key(self._next_sid()), Raw(payload), ttl=life, owner=owner):
            self._choose_new_id()
        self._mark_saved(new_loaded((payload, 0, 0, life, owner, None)), True)
        self._cookie = Cookie.SEND
        return True

    def _mark_saved(self, record: Loaded, changed: bool) -> None:
        """Note what the store holds now."""
        self._was_written = True
        self._was_modified |= self._modified or changed
        self._record, self._stored_sid = record, self._next_sid()
        self._cleared = self._modified = False

    def _send_cookie(self) -> None:
        if self._can_set_cookie():
            self._cookie = Cookie.SEND

    def _end_if_empty(self) -> None:
        """Destroy the session if this request removed its last key and no other request has added one."""
        store, can_reply = self._store(), self._can_set_cookie()
        # If this must not block, the next save calls it again: the data was removed, and it would find nothing to do.
        ended = store.destroy_if_empty(self._store_key(self._stored_sid), [PERMANENT], tombstone=can_reply)
        self._emptied = False
        if ended:
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
        initial_data = self._initial_data()
        super().clear()
        self.update(initial_data)
        self._detach()

    def _detach(self) -> None:
        """Become a new session that keeps the current data: another thread may have set some just now."""
        self._record = self._sid = None
        self._unreadable = _NO_KEYS
        self._new = True
        self._partial = self._rotation_pending = self._cleared = self._modified = False

    def _initial_data(self) -> dict[str, Any]:
        """Return what remains when all data is removed: the permanent flag and the markers for this request's end."""
        return self._policy.initial_data() | {key: each for key, each in self._markers.items() if self.get(key) == each}

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
        except STORE_ERRORS as error:
            self._degrade(error)
            return otherwise

    def _degrade(self, error: Exception) -> None:
        """Stop using the store in this request after an error; raise the error if `on_error` is "raise"."""
        self._discarded, self._store_error = True, error
        # Fail once: the page that reports the error finds an empty session and does not wait again.
        self._fill(self._policy.initial_data())
        if self._policy.on_error == "raise":
            raise error
        if times := _unavailable.due():
            logger.warning("requests without a session: %d; the session store is unavailable: %s", times, error)

    def _store_key(self, sid: str) -> str:
        return self._policy.key_prefix + sid


def _is_being_changed(error: Exception) -> bool:
    """Return whether an encoder has failed because another thread is changing a value."""
    pass_on_interruption(error)
    cause = error.__cause__ or error  # Python's "changed size during iteration"
    return isinstance(cause, RuntimeError) and not isinstance(cause, RecursionError)


def id_lock_name(key: str) -> str:
    """
    Name the lock held while the id of an owner's session changes, or while the owner's other sessions are destroyed.

    A swap of a session without an owner takes no lock: those who destroy an owner's sessions save their own first. A
    rename always takes it, because it merges into a session that may have got an owner since it was read.
    """
    return f"id {key}"


def _list_lock_name(key: str) -> str:
    """Name the lock held while a list is written: nothing is appended between its merge and its write."""
    return f"lists {key}"


def _starts_with(whole: list[Any], part: list[Any]) -> bool:
    return whole[: len(part)] == part


def _appended(after: list[Any], before: list[Any]) -> list[Any]:
    """Return the items appended to a list; all of them if it does not start with the items it had before."""
    return after[len(before) :] if _starts_with(after, before) else after
