"""The lock of an arena: a robust, process-shared, recursive pthread mutex inside the shared memory itself.

Why a mutex and not ``flock``: both were measured (CONTRIBUTING.md, "Choices made by measurement"). It carries
a third more locked sections per second at 1, 2 and 8 processes, and needs neither a descriptor to reopen after a
fork nor a second lock between threads: the kernel knows its owner by thread id, tells the next one when that owner died
(``EOWNERDEAD``), and unlocking what one does not own is refused. So a ``finally`` may always unlock, also when a signal
handler raised before the lock was taken.

Why polling and not ``pthread_mutex_timedlock``: the lock is held for microseconds, so trying again beats sleeping in
the kernel, and ``time.sleep``, looked up at call time, lets other greenlets run.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable
from functools import partial
from mmap import mmap

from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.system.processes import status

MUTEX_SIZE = 40  # sizeof(pthread_mutex_t) on 64-bit Linux, glibc and musl alike

_GLIBC = "CS_GNU_LIBC_VERSION" in os.confstr_names and bool(os.confstr("CS_GNU_LIBC_VERSION"))
LIBC = "glibc" if _GLIBC else "musl"

# Where the owner's thread id and the depth of recursion stand inside the mutex, in 4-byte words.
_OWNER_WORD, _DEPTH_WORD = (0, 1) if _GLIBC else (1, 5)
_ONCE = 1 if _GLIBC else 0  # what the depth is when the lock is held by one call
_TID_MASK = 0x3FFFFFFF  # linux/futex.h: FUTEX_TID_MASK
_PROCESS_SHARED = 1  # pthread.h, the same numbers in both libraries
_ROBUST = 1
_RECURSIVE = 1

# How to wait: first try again at once (the holder runs on another core and needs microseconds), then give way (it is
# ready to run, and may need this very core), then sleep (it is stopped, or the machine is overloaded).
_SPINS = 200
_YIELDING = 0.005  # seconds
_NAP, _LONGEST_NAP = 0.0001, 0.002  # seconds
# What one look counts at most, in seconds. If more has gone by, the machine stood still, or this process, or a greenlet
# would not give way; the holder may have had none of that time either.
_LONGEST_LOOK = 0.1

# PyDLL keeps the GIL: none of these calls blocks, and giving the GIL away would cost more than the call.
_libc = ctypes.PyDLL(None)


def _function(name: str, *argument_types: type) -> Callable[..., int]:
    function = _libc[name]
    function.argtypes = argument_types
    function.restype = ctypes.c_int
    return function


_try_lock = _function("pthread_mutex_trylock", ctypes.c_void_p)
_unlock = _function("pthread_mutex_unlock", ctypes.c_void_p)
_make_consistent = _function("pthread_mutex_consistent", ctypes.c_void_p)
_init = _function("pthread_mutex_init", ctypes.c_void_p, ctypes.c_void_p)
_attr_init = _function("pthread_mutexattr_init", ctypes.c_void_p)
_attr_set = [
    (_function("pthread_mutexattr_setpshared", ctypes.c_void_p, ctypes.c_int), _PROCESS_SHARED),
    (_function("pthread_mutexattr_setrobust", ctypes.c_void_p, ctypes.c_int), _ROBUST),
    (_function("pthread_mutexattr_settype", ctypes.c_void_p, ctypes.c_int), _RECURSIVE),
]


class Lock:
    """
    Mutual exclusion among all threads of all processes that map one arena.

    Used as ``try: lock.acquire(timeout) ... finally: lock.release()`` with the ``acquire`` inside the ``try``: whatever
    instruction a signal handler's exception hits, ``release`` runs, and is refused if this thread is not the owner.

    Args:
        memory: The shared mapping.
        offset: Where in it the mutex lies, in bytes.
        fresh: Initialise it. Only for memory that nobody else has mapped.
    """

    def __init__(self, memory: mmap, offset: int, *, fresh: bool) -> None:
        # An array on the mapping, not its address: whoever is in the middle of a call keeps the memory mapped.
        self._mutex = self._words = (ctypes.c_uint32 * (MUTEX_SIZE // 4)).from_buffer(memory, offset)
        # partial runs in C: no bytecode, hence no signal handler, between a `finally` and the unlock
        self.release: Callable[[], int] = partial(_unlock, self._mutex)
        if fresh:
            attributes = ctypes.create_string_buffer(16)
            _attr_init(attributes)
            for setter, value in _attr_set:
                setter(attributes, value)
            _init(self._mutex, attributes)

    def acquire(self, timeout: float) -> float:
        """
        Take the lock, waiting at most ``timeout`` seconds in which this process ran; negative: not at all.

        Returns:
            The seconds that went by, 0 if it was free.

        Raises:
            StoreTimeout: It was not free in time (the message names the holder's pid), or this very thread holds it: a
                signal handler or a finalizer called the store in the middle of a call to the store.
            StoreUnavailable: The mutex itself is damaged.
        """
        waited = 0.0
        try:
            code = _try_lock(self._mutex)
            if code:
                waited = self._wait(code, timeout)
        except StoreTimeout:
            raise
        except BaseException:
            # Between learning that the owner died and saying that we cope, an exception would make the mutex
            # unusable for good as soon as it is unlocked. A no-op in every other case.
            _make_consistent(self._mutex)
            raise
        if self._words[_DEPTH_WORD] > _ONCE:
            raise StoreTimeout("the store was called again from inside one of its own calls (signal handler?)")
        return waited

    def _wait(self, code: int, timeout: float) -> float:
        tries, waited, nap = 0, 0.0, _NAP
        begun = last = time.monotonic()
        while code == errno.EBUSY:
            tries += 1
            if timeout < 0:
                raise StoreTimeout("the store's lock is busy")
            if tries >= _SPINS:
                now = time.monotonic()
                waited += min(now - last, _LONGEST_LOOK)
                last = now
                if waited < _YIELDING:
                    os.sched_yield()
                elif waited < timeout:
                    time.sleep(nap)
                    nap = min(nap * 1.2, _LONGEST_NAP)
                else:
                    message = f"the store's lock was not free for {timeout:g} s: {self.holder()} holds it"
                    raise StoreTimeout(message, waited=now - begun)
            code = _try_lock(self._mutex)
        if code == errno.EOWNERDEAD:
            _make_consistent(self._mutex)  # what its owner left half done is settled by the arena's journal
        elif code:
            raise StoreUnavailable(f"the store's lock is damaged ({os.strerror(code)}): stop all users, start again")
        return time.monotonic() - begun if tries else 0.0  # else it was free, and its last holder is dead

    def holder(self) -> str:
        """Return who holds the lock, for messages."""
        tid = self._words[_OWNER_WORD] & _TID_MASK
        try:
            fields = status(tid)
            return f"process {fields['Tgid']} ({fields['State']})"
        except (OSError, KeyError):
            return f"thread {tid}, which cannot be seen from here,"
