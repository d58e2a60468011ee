"""
The session of one request, for any web framework: a dict that is read on first access and written back key by key.

A framework integration does three things: it creates a `Session` from the id in the request's cookie, calls
`save(final=True)` before the response is sent, and sets or deletes the cookie as `cookie_of` says. `shmstore.flask` is
one such integration. In an event loop it awaits `load` and `save` of this module, which let other tasks run while they
wait; `shmstore.asgi` does.

What only an integration needs is a function of this module, not a method: templates look up attributes before keys, so
each public name of a session hides a key.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Final

from shmstore.contract import Capability
from shmstore.errors import ConfigError, SerializationError, StoreTimeout
from shmstore.options import Duration, seconds
from shmstore.policy import PERMANENT
from shmstore.system.blocking import WouldBlock
from shmstore.system.event_loop import in_thread, run, sleep, take_turn
from shmstore.system.signals import pass_on_interruption, suppressing
from shmstore.system.throttle import Throttle
from shmstore.web.cookie import Cookie
from shmstore.web.stored_session import STORE_ERRORS, StoredSession, id_lock_name

__all__ = [
    "Cookie", "Session", "cookie_of", "discard", "end_response", "is_unannounced", "load", "save", "unsaved",
]  # fmt: skip

logger = logging.getLogger("shmstore")

_ownerless: Final = Throttle()

_ABSENT: Final = object()

_MIN_PAUSE, _MAX_PAUSE = 0.0002, 0.01  # seconds between attempts of a coroutine to take a lock


class Session(StoredSession):
    """
    One visitor's session during one request.

    Nothing is read before the first access, and nothing is stored before there is data. `Session.save` compares the
    encoded session with the stored one, and writes what has changed (a change deep inside a value counts; assigning an
    equal value does not). Overlapping requests of one user keep each other's top-level keys. If two requests change the
    same key, the later save wins; `lock` serialises them. A save never restores a session that another request has
    destroyed or rotated: the save is dropped.

    Threads of one request may share the session. All keys they set are kept, provided that each thread saves what it
    has set, or the response is saved afterwards.

    After the response has been sent, or without a response (a WebSocket), a save still changes a stored
    session. It does not create one, because no browser would learn the id, and it stores no login, because the old id
    would stay valid. `rotate` waits for the next request that has a response.

    Attributes:
        accessed: Whether the response may depend on the session and therefore needs ``Vary: Cookie``.

    Args:
        store: Returns the store. It is a function so that a request that never accesses its session does not open
            the store.
        sid: The id in the request's cookie, if any, or the ids from several cookies with that name. The first id that
            the store knows is used.
        policy: The application's rules.
        request: The framework's request, for subclasses that inspect it.
    """

    def __bool__(self) -> bool:
        """Return whether there is data; being permanent does not count."""
        return self._has_data(self)

    def __delitem__(self, key: str) -> None:
        if key in self._unreadable:
            self._unreadable -= {key}
            super().pop(key, None)
        else:
            super().__delitem__(key)

    def pop(self, key: str, /, *default: Any) -> Any:
        """Remove a key and return its value, or the default if given and the key is missing."""
        value = super().pop(key, *default)
        self._unreadable -= {key}  # the stored value is removed although it cannot be returned
        return value

    def clear(self) -> None:
        """Remove all data. If the session is still empty when it is saved, it is destroyed."""
        with self._lock:
            initial_data = self._initial_data()
            self._unreadable = frozenset()
            super().clear()
            super().update(initial_data)
            self._cleared = True

    # -- properties --------------------------------------------------------------------------------

    @property
    def sid(self) -> str:
        """The id that the browser sent if the store knows it, otherwise a new one. After `rotate`, the next id."""
        self._look()
        with self._lock:
            return self._next_sid()

    @property
    def new(self) -> bool:
        """Whether this request started the session."""
        self._look()
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

        Setting it is not needed to have changes saved; it makes the next `Session.save` send the cookie again.
        """
        if type(self) is self._unread:
            return False
        with self._lock:
            return self._modified or self._was_modified or self._differs()

    @modified.setter
    def modified(self, value: bool) -> None:
        self._look()
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
            False if changes are not stored: another request has destroyed or rotated the session in the meantime (or
            just before, and this request came with the old id); no response could announce a new session, or the new id
            that follows a login, to the browser; or the store was unavailable and ``on_error`` is ``"anonymous"``. No
            cookie is sent then, and the reason is logged. Without changes the store is asked only if the ttl or the
            cookie is due.

        Raises:
            StoreUnavailable: The store cannot be reached and ``on_error`` is ``"raise"``.
            SerializationError: A value cannot be stored. The stored session is unchanged.
            RecordTooLarge: The session has grown too large. The stored session is unchanged.
        """
        if type(self) is self._unread:
            self._response_sent |= final
            if type(self) is self._unread:  # a thread that reads it from here on sees `_response_sent`
                return not self._discarded
        with self._lock:
            stored = not self._discarded
            if stored:
                try:
                    stored = self._write(refresh)
                except STORE_ERRORS as error:
                    self._degrade(error)
            elif not self._drop_logged and self._store_error is None:
                with suppressing(*STORE_ERRORS):
                    if self._has_changes():
                        self._log_dropped_save()
            self._response_sent |= final
            return stored and not self._discarded

    def rotate(self) -> None:
        """
        Give the session a new id at the next save and keep its data. The old id is invalid from then on.

        If no response can set the cookie, the next request that has one changes the id.
        """
        self._look()
        with self._lock:
            self._choose_new_id()

    def regenerate(self) -> None:
        """
        Destroy the session and start a new, empty one under a new id. It is stored once there is data.

        `rotate` keeps the data, as does ``regenerate(session)`` of `shmstore.flask.StoreSessionInterface`.
        """
        self.destroy()

    def destroy(self) -> bool:
        """
        Destroy the session at once. Data that is set afterwards starts a new session under a new id.

        Returns:
            Whether there was a stored session. False if another request of this browser destroyed or rotated it first:
            the browser may have a newer cookie, so this response sets none, and only a login starts a new session.
        """
        self._look()
        with self._lock:
            ended = self._destroy_stored_session()
            self._stale_cookie |= self._discarded and self._record is None  # the browser's cookie is not known
            self._discarded, self._store_error = False, None
            self._reset()
            return ended

    def destroy_others(self) -> int:
        """
        Log out the other devices: destroy all other sessions of this session's user in the whole store.

        The user is what ``owner_key`` finds in the session now, saved or not.

        Returns:
            The number of destroyed sessions. 0, with a log line, if no user is logged in. 0 also if this session itself
            has been destroyed, an overlapping request has changed its id, or no response can follow a login. A request
            that changes the id during the call waits.

        Raises:
            ConfigError: ``owner_key`` is None, so sessions have no owners.
            SerializationError, RecordTooLarge: A session whose user has changed is saved first, and cannot be stored.
            StoreUnavailable, StoreFull: The store cannot be reached, or failed earlier in this request. Raised whatever
                ``on_error`` is, because some sessions may not have been destroyed.
        """
        if not self._policy.has_owners:
            raise ConfigError("destroy_others() needs to know the owner of a session: OWNER_KEY is None")
        self._look()
        with self._lock:
            if self._store_error is not None:  # the session was not read: the user is not known
                raise self._store_error
            owner = self._policy.owner(self.copy())
            if owner is None and (times := _ownerless.due()):
                logger.warning(
                    "calls of destroy_others() that ended nothing: %d; OWNER_KEY finds no user in the session", times
                )
            if owner is None or self._discarded:
                return 0
            if self._record is None or self._record.owner != owner:
                saved = self.save()  # see `id_lock_name`
                if self._store_error is not None:
                    raise self._store_error
                if not saved:
                    return 0
            store, key = self._store(), self._store_key(self._stored_sid)
            if self._record is None:
                return store.destroy_owned(owner)
            with store.lock(id_lock_name(key)):
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
        self._look()
        with self._lock:
            return self._reload(self.copy())

    def touch(self) -> bool:
        """
        Renew the life of the session now. A request that accesses its session does so when it is due.

        Returns:
            Whether the session is stored.
        """
        self._look()
        with self._lock:
            record = self._record
            if record is None or self._discarded:
                return False
            life = self._policy.remaining_ttl(record.created)
            if not self._try_store(lambda: self._store().touch(self._store_key(self._stored_sid), ttl=life), True):
                self._discard()
            self._record = record._replace(remaining=life)
            return not self._discarded

    def lock(self, timeout: Duration = 5.0) -> SessionLock:
        """
        Serialise with other requests that use this lock: for a value that is read, changed and written back.

        The session is read again when the lock is acquired, and saved when it is released. If an exception leaves the
        block, all unsaved changes are discarded, also those of other threads of this request. Requests that do not use
        the lock are not delayed. The lock is released when its process ends.

        Use ``with session.lock():``, or ``async with session.lock():`` in a coroutine, where other tasks run meanwhile.

        Args:
            timeout: How long to wait for the lock, in seconds or as a timedelta.

        Raises:
            StoreTimeout: The lock was not free in time.
        """
        return SessionLock(self, timeout)

    # -- for subclasses and integrations -----------------------------------------------------------

    def _reload(self, known: dict[str, Any]) -> bool:
        """Read the session again, and discard the values in ``known``, but none that other threads set meanwhile."""
        after = None
        if self._record is not None:
            after = self._try_store(lambda: self._fetch(self._stored_sid), None)
            if after is None:
                self._discard()
        there = self._initial_data() if after is None else after
        for key in list(self):  # never empty in between: other threads may be reading it
            if key not in there and self.get(key, _ABSENT) is known.get(key, _ABSENT):
                super().pop(key, None)
        for key, value in there.items():
            if self.get(key, _ABSENT) is known.get(key, _ABSENT):
                self[key] = value
        self._cleared = self._modified = False
        return after is not None

    def _has_changes(self) -> bool:
        """Return whether there is something that a save would write."""
        if self._record is None:
            return self._has_data(self._content())
        try:
            return self._differs()
        except SerializationError:
            return True

    def _differs(self) -> bool:
        """Return whether the data is not what is stored."""
        data, record = self._content(), self._record
        if record is None:
            return bool(data)
        payload = self._encode(self._store().codec, data)
        return payload != record.payload and any(self._changes(record, payload, self._unreadable))

    def _may_block(self) -> bool:
        """Return whether the calling thread may wait, and does not run the event loop of other requests."""
        return True


class SessionLock(AbstractContextManager[None], AbstractAsyncContextManager[None]):
    """The lock of a session, for one ``with`` or ``async with`` block; see `Session.lock`."""

    def __init__(self, session: Session, timeout: Duration) -> None:
        self._session, self._timeout = session, seconds(timeout, "timeout")
        # It is released with its last reference, at the latest.
        self._held: AbstractContextManager[None] = nullcontext()
        self._turn = ExitStack()  # empty but for `async with`

    def __enter__(self) -> None:
        if not self._session._may_block():
            raise RuntimeError("`with session.lock()` would stop the event loop: use `async with session.lock()`")
        self._prepare()
        self._held = self._begun(self._timeout)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(failed=kind is not None)

    async def __aenter__(self) -> None:
        session, deadline = self._session, time.monotonic() + self._timeout
        await run(self._prepare)
        if session._record is not None:
            # The tasks of one event loop queue up, so that only the first of them has to poll the lock.
            name = session._store(), session._store_key(session._stored_sid)
            try:
                self._turn.callback(await take_turn(name, self._timeout))
            except TimeoutError as exc:
                pass_on_interruption(exc)
                raise self._timed_out() from None
        try:
            self._held = await self._begun_meanwhile(deadline)
        except BaseException:
            self._turn.close()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is GeneratorExit:  # the coroutine is closed and must not await: its event loop may have ended
                return self._end(failed=True)
            await (in_thread if self._waits() else run)(partial(self._end, failed=kind is not None))
        finally:
            self._turn.close()

    # If the task is cancelled, a thread may still be in one of the following functions. So the same call that takes the
    # lock reads the session, and the same call that saves the session releases the lock.

    def _prepare(self) -> None:
        """Save the session: other requests cannot use what is not stored, so without data no lock is taken."""
        self._session._look()
        self._session.save()

    def _begun(self, timeout: float) -> AbstractContextManager[None]:
        """Take the lock, and read the session again."""
        session = self._session
        held: AbstractContextManager[None] = nullcontext()
        if session._record is not None:
            held = session._store().lock(session._store_key(session._stored_sid), timeout)
        held.__enter__()
        try:
            with session._lock:
                if session._record is not None:
                    known = session.copy()
                    session.save()  # what other threads of this request have set while this one waited
                    known |= {name: session[name] for name in session._merged_lists if name in session}  # merged by it
                    session._reload(known)
        except BaseException:
            held.__exit__(None, None, None)
            raise
        return held

    async def _begun_meanwhile(self, deadline: float) -> AbstractContextManager[None]:
        """
        Take the lock, and read the session again; other tasks run in the meantime.

        It polls: waiters in threads could occupy all threads of the event loop, and the holder may need one to save.
        """
        pause = _MIN_PAUSE
        while True:
            taken, cancelled = list[AbstractContextManager[None]](), threading.Event()
            try:
                await run(partial(self._begin_for_task, taken, cancelled))
                return taken.pop()
            except StoreTimeout as error:
                if time.monotonic() >= deadline:
                    raise self._timed_out() from error
            except BaseException as error:
                cancelled.set()
                if taken:  # the thread was faster
                    if isinstance(error, GeneratorExit) or not self._waits():
                        _release_once(taken)
                    else:
                        await in_thread(partial(_release_once, taken))
                raise
            await sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)

    def _begin_for_task(self, taken: list[AbstractContextManager[None]], cancelled: threading.Event) -> None:
        """Take the lock, and read the session again. If the task was cancelled meanwhile, release the lock."""
        if cancelled.is_set():  # before a thread was free
            return
        taken.append(self._begun(0))
        if cancelled.is_set():
            _release_once(taken)

    def _waits(self) -> bool:
        """Return whether a release may wait for a server. It cannot be repeated, so the event loop never tries it."""
        try:
            return Capability.SEVERAL_HOSTS in self._session._store().capabilities
        except STORE_ERRORS:
            return True

    def _timed_out(self) -> StoreTimeout:
        return StoreTimeout(f"another caller has held the lock of this session for {self._timeout:g} s")

    def _end(self, *, failed: bool) -> None:
        """Save the session, or discard its changes, and release the lock."""
        try:
            self._save_or_reload(failed)
        except WouldBlock:
            raise  # it is called again
        except BaseException:
            self._release()
            raise
        self._release()

    def _save_or_reload(self, failed: bool) -> None:
        session = self._session
        try:
            if not failed:
                session.save()
        except WouldBlock:
            raise
        except BaseException:
            session.reload()
            raise
        if failed:
            session.reload()

    def _release(self) -> None:
        held, self._held = self._held, nullcontext()
        held.__exit__(None, None, None)


def _release_once(taken: list[AbstractContextManager[None]]) -> None:
    """Release a lock, unless another thread does that."""
    try:
        held = taken.pop()
    except IndexError:
        return
    held.__exit__(None, None, None)


def cookie_of(session: Session) -> tuple[Cookie, str]:
    """
    For framework integrations: what the response does with the cookie, and the id to set.

    Call it after `Session.save`. The id is the stored one: `session.sid` may be changing in another thread.
    """
    return session._cookie, session._stored_sid


def is_unannounced(session: Session) -> bool:
    """For framework integrations: whether a save has changed the id, so that the browser's is invalid."""
    changed = session._cookie_valid and session._stored_sid not in (session._cookie_sids or ())
    return changed and session._cookie is Cookie.SEND


def unsaved(session: Session) -> bool:
    """For framework integrations: whether the session was accessed, and a save has something to store."""
    if type(session) is session._unread or session._discarded:
        return False
    with session._lock:
        renamed = session._rotation_pending or (session._record is not None and session._sid != session._stored_sid)
        return session._modified or renamed or session._differs()


async def load(session: Session) -> None:
    """
    For framework integrations in an event loop: read the session before its first access, which then cannot block.

    This does not count as an access. An error of the store is raised by the access. C code that takes the items of a
    dict without calling a method sees the data; that does not count as an access either.
    """
    if type(session) is not session._unread:
        return
    try:
        data = session._read_ahead = await run(session._find)
        session._show(data)
    except STORE_ERRORS as error:
        session._read_ahead = error


async def save(session: Session, *, refresh: bool = False, final: bool = False) -> bool:
    """For framework integrations in an event loop: `Session.save`, while other tasks run if it has to wait."""
    return await run(partial(session.save, refresh=refresh, final=final))


def discard(session: Session) -> None:
    """For framework integrations: save nothing more, because a failed save is about to be reported."""
    session._discarded = session._drop_logged = True


def end_response(session: Session) -> None:
    """For framework integrations: no response follows that could set the cookie, as after a final `Session.save`."""
    session._response_sent = True
