"""
The lock of an arena: a robust, process-shared, recursive pthread mutex inside the shared memory itself, or a lock of
this process' threads (`ThreadMutex`) for memory that no other process uses.

Why a mutex and not ``flock``: `benchmarks/choices.py` compares them. The mutex completes 1.7, 1.2 and 1.3 times as many
locked sections per second at 1, 2 and 8 processes. It needs neither a descriptor to reopen after a fork nor a second
lock between threads. The kernel knows the owner by its thread id, reports the owner's death to the next one to lock
(``EOWNERDEAD``), and refuses to unlock for a thread that is not the owner. A ``finally`` may therefore always unlock,
even if a signal handler raised before the lock was taken.

Why polling and not ``pthread_mutex_timedlock``: the lock is held for microseconds, so trying again beats sleeping in
the kernel, and ``time.sleep``, looked up at call time, lets other greenlets run.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from _thread import TIMEOUT_MAX, RLock, get_native_id
from collections.abc import Callable
from functools import partial
from itertools import repeat
from mmap import mmap
from typing import Any

from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.system.blocking import before_blocking
from shmstore.system.forks import on_fork
from shmstore.system.platform import LIBC, libc_function
from shmstore.system.processes import status
from shmstore.system.signals import pass_on_interruption

MUTEX_SIZE = 40  # sizeof(pthread_mutex_t) on 64-bit Linux, glibc and musl alike

# Position of the owner's thread id and of the recursion depth inside the mutex, in 4-byte words.
_OWNER_WORD, DEPTH_WORD = (0, 1) if LIBC == "glibc" else (1, 5)
LOCKED_ONCE = 1 if LIBC == "glibc" else 0  # the recursion depth when the lock is held by one call
_TID_MASK = 0x3FFFFFFF  # linux/futex.h: FUTEX_TID_MASK
_PROCESS_SHARED = 1  # pthread.h, the same numbers in both libraries
_ROBUST = 1
_RECURSIVE = 1

# How to wait: first retry at once (the holder runs on another core and needs microseconds). Then sleep in C, also in
# gevent's hub, where nothing else may sleep (the holder is ready to run and may need this core). Then sleep so that
# other greenlets run (the holder is stopped, or the machine is overloaded). Not `sched_yield`: eight writers that yield
# get less equal shares of the processor; `python -m benchmarks --only many` prints the shares.
_SPINS = 400  # some 100 us
_USLEEP_TIME = 0.005  # seconds
_MIN_SLEEP, _MAX_SLEEP = 0.000001, 0.002  # seconds; Linux adds 50 us
# The most that one check adds to the waiting time, in seconds. If more time has passed, the machine or this process was
# suspended, or a greenlet did not yield, and the holder may not have run either.
_MAX_COUNTED = 0.1

_try_lock = libc_function("pthread_mutex_trylock", ctypes.c_void_p)
_unlock = libc_function("pthread_mutex_unlock", ctypes.c_void_p)
_make_consistent = libc_function("pthread_mutex_consistent", ctypes.c_void_p)
_usleep = libc_function("usleep", ctypes.c_uint, blocks=True)
_init = libc_function("pthread_mutex_init", ctypes.c_void_p, ctypes.c_void_p)
_attr_init = libc_function("pthread_mutexattr_init", ctypes.c_void_p)
_attr_set = [
    (libc_function("pthread_mutexattr_setpshared", ctypes.c_void_p, ctypes.c_int), _PROCESS_SHARED),
    (libc_function("pthread_mutexattr_setrobust", ctypes.c_void_p, ctypes.c_int), _ROBUST),
    (libc_function("pthread_mutexattr_settype", ctypes.c_void_p, ctypes.c_int), _RECURSIVE),
]


_RLock: Any = RLock  # some of its methods are private to the standard library, which relies on them too
_NESTED = "the store was called again from inside one of its own calls (signal handler?)"


class Mutex:
    """
    Mutual exclusion among all threads of all processes that map one arena.

    Used as ``try: lock.acquire(timeout) ... finally: lock.release()`` with ``acquire`` inside the ``try``: at whatever
    instruction a signal handler raises, ``release`` runs, and is refused if this thread is not the owner.

    Args:
        memory: The shared mapping.
        offset: The position of the mutex in it, in bytes.
        fresh: Initialise the mutex. Only for memory that no other process has mapped.
    """

    def __init__(self, memory: mmap, offset: int, *, fresh: bool) -> None:
        # An array on the mapping, not its address: a call in progress keeps the memory mapped.
        self._mutex = self._words = (ctypes.c_uint32 * (MUTEX_SIZE // 4)).from_buffer(memory, offset)
        # A partial runs in C, so no signal handler can run between the start of a `finally` and the unlock.
        self.release: Callable[[], int] = partial(_unlock, self._mutex)
        if fresh:
            attributes = ctypes.create_string_buffer(16)
            _attr_init(attributes)
            for setter, value in _attr_set:
                setter(attributes, value)
            _init(self._mutex, attributes)

    def acquire(self, timeout: float) -> float:
        """
        Take the lock.

        Args:
            timeout: Seconds to wait, at least 0.005, not counting time in which this process was suspended; negative:
                do not wait.

        Returns:
            The seconds waited, 0 if the lock was free.

        Raises:
            StoreTimeout: The lock was not free in time (the message names the holder's pid), or this very thread holds
                it: a signal handler or a finalizer called the store in the middle of a call to the store.
            StoreUnavailable: The mutex itself is damaged.
        """
        waited = 0.0
        try:
            code = _try_lock(self._mutex)
            if code:
                waited = self._wait(code, timeout)
        except BaseException:
            # An exception between the report of a dead owner and this call would make the mutex permanently unusable
            # at its next unlock. Another thread may own the mutex by then; glibc would make this thread its owner.
            if self._words[_OWNER_WORD] & _TID_MASK == get_native_id():
                _make_consistent(self._mutex)
            raise
        if self._words[DEPTH_WORD] > LOCKED_ONCE:
            raise StoreTimeout(_NESTED)
        return waited

    def _wait(self, code: int, timeout: float) -> float:
        tries, waited, pause = 0, 0.0, _MIN_SLEEP
        begun = last = time.monotonic()
        while code == errno.EBUSY:
            tries += 1
            if timeout < 0:
                raise StoreTimeout("the store's lock is busy")
            if tries >= _SPINS:
                before_blocking()
                now = time.monotonic()
                waited += min(now - last, _MAX_COUNTED)
                last = now
                if waited < _USLEEP_TIME:
                    _usleep(int(pause * 1e6))
                elif waited < timeout:
                    time.sleep(pause)
                else:
                    message = f"the store's lock was not free for {timeout:g} s: {self.holder()} holds it"
                    raise StoreTimeout(message, waited=now - begun)
                pause = min(pause * 1.2, _MAX_SLEEP)
            code = _try_lock(self._mutex)
        if code == errno.EOWNERDEAD:
            _make_consistent(self._mutex)  # the arena's journal completes what the owner left unfinished
        elif code:
            message = f"the store's lock is damaged ({os.strerror(code)}): stop all users of the store, then start them"
            raise StoreUnavailable(message)
        return time.monotonic() - begun if tries else 0.0  # no tries: it was free, and its last holder has died

    def holder(self) -> str:
        """Return a description of the process that holds the lock, for messages."""
        tid = self._words[_OWNER_WORD] & _TID_MASK
        try:
            fields = status(tid)
            return f"process {fields['Tgid']} ({fields['State']})"
        except (OSError, KeyError) as error:
            pass_on_interruption(error)
            return f"thread {tid}, which is not visible from here,"


class ThreadMutex:
    """
    Mutual exclusion among the threads of this process. It is used as `Mutex` is.

    In a forked child it is free. A mutation that a thread of the parent had in progress is completed there by the
    journal, as after the death of a process.
    """

    def __init__(self) -> None:
        # Never gevent's lock: no greenlet gives way to another one while it holds this.
        self._lock = lock = _RLock()
        # Releases the lock if this thread holds it. All of it runs in C, as with `Mutex.release`: each step takes an
        # iterator over the lock, which is empty if this thread does not hold it, and releases what the iterator yields.
        held = map(partial(filter, _RLock._is_owned), repeat((lock,)))
        self.release: Callable[[], object] = map(next, map(partial(map, _RLock.release), held), repeat(None)).__next__
        on_fork(self)

    def acquire(self, timeout: float) -> float:
        """Take the lock; see `Mutex.acquire`."""
        nested = self._lock._is_owned()
        begun = 0.0
        if not self._lock.acquire(blocking=False):
            if timeout < 0:
                raise StoreTimeout("the store's lock is busy")
            before_blocking()
            begun = time.monotonic()
            if not self._lock.acquire(timeout=min(timeout, TIMEOUT_MAX)):
                message = f"the store's lock was not free for {timeout:g} s: {self.holder()} holds it"
                raise StoreTimeout(message, waited=time.monotonic() - begun)
        if nested:
            raise StoreTimeout(_NESTED)
        return time.monotonic() - begun if begun else 0.0

    def holder(self) -> str:
        """Return a description of the holder of the lock, for messages."""
        return "another thread of this process"

    def after_fork_in_child(self) -> None:
        self._lock._at_fork_reinit()
