"""
What differs between operating systems, in one module: the services of Linux, and what stands in for them elsewhere.

Processes share a store only where `LACKING` is empty: on 64-bit Linux with CPython. On any other platform the package
can be imported, and a store is private to its process. Code that needs a service of Linux runs only after `LACKING` was
checked, so the services that other platforms lack are replaced here by objects that raise `OSError` when they are used.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import math
import mmap
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

from shmstore.system.signals import pass_on_interruption

__all__ = [
    "LACKING", "LIBC", "boottime_ns", "close", "fcntl", "file_system", "getegid", "geteuid", "libc_function",
    "physical_memory", "private_memory", "pwd", "register_at_fork", "resource",
]  # fmt: skip

_NEED: Final = "a store that processes share needs CPython on 64-bit Linux"
_NAMES: Final = {"darwin": "macOS", "win32": "Windows", "linux": "Linux"}
_MODULES: Final = ("fcntl", "pwd", "resource")
_CALLS: Final = ("eventfd", "geteuid", "getresuid", "memfd_create", "posix_fallocate", "register_at_fork")
_MUTEX_CALLS: Final = ("pthread_mutex_consistent", "pthread_mutexattr_setpshared", "pthread_mutexattr_setrobust")


class _Absent:
    """A module that this platform lacks."""

    def __getattr__(self, name: str) -> Any:
        raise OSError(errno.ENOTSUP, LACKING)


def _absent(*_: object) -> int:
    raise OSError(errno.ENOTSUP, LACKING)


try:
    import fcntl
    import pwd
    import resource
except ImportError:
    fcntl = pwd = resource = _Absent()  # type: ignore[assignment]

# PyDLL keeps the GIL: no function called through it blocks, and releasing the GIL would cost more than the call.
_libc: Final[Any] = ctypes.PyDLL(None) if sys.platform == "linux" else None


def _lacking() -> str:
    python = {"cpython": "CPython", "pypy": "PyPy"}.get(sys.implementation.name, sys.implementation.name)
    if (python, sys.platform) != ("CPython", "linux") or sys.maxsize < 2**32:
        bits = "" if sys.maxsize > 2**32 else ", 32 bits"
        return f"{_NEED}; this is {python} on {_NAMES.get(sys.platform, sys.platform)}{bits}"
    missing = [name for name in _MODULES if isinstance(globals()[name], _Absent)]
    missing += [f"os.{name}" for name in _CALLS if not hasattr(os, name)]
    missing += [name for name in _MUTEX_CALLS if not hasattr(_libc, name)]
    return f"{_NEED}, and this Python lacks {', '.join(missing)}" if missing else ""


LACKING: Final = _lacking()
"""Why processes cannot share a store on this platform; empty if they can."""


def _name_of_libc() -> str:
    if LACKING:
        return ""
    return "glibc" if "CS_GNU_LIBC_VERSION" in os.confstr_names and os.confstr("CS_GNU_LIBC_VERSION") else "musl"


LIBC: Final = _name_of_libc()
"""The C library, whose mutexes processes share; empty where they do not."""


def libc_function(name: str, *argument_types: type, blocks: bool = False) -> Callable[..., int]:
    """Return a function of the C library. It is called with the GIL, unless it blocks."""
    if LACKING:
        return _absent
    function: Any = (ctypes.CDLL(None) if blocks else _libc)[name]
    function.argtypes = argument_types
    function.restype = ctypes.c_int
    return cast("Callable[..., int]", function)


def file_system(file: int | str) -> int:
    """Return the number in linux/magic.h of the file system of a file, given by its descriptor or path; 0: unknown."""
    status = (ctypes.c_long * 64)()  # a struct statfs begins with its f_type
    libc = ctypes.CDLL(None)  # releases the GIL: the file may be on another machine
    failed = libc.fstatfs(file, status) if isinstance(file, int) else libc.statfs(os.fsencode(file), status)
    return 0 if failed else int(status[0])


boottime_ns: Final[Callable[[], int]] = (
    time.monotonic_ns if LACKING else partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
)
"""A clock that no change of the wall clock steps; on Linux it includes the time in which the machine is suspended."""

close: Final[Callable[[int], None]] = importlib.import_module(os.name).close
"""`os.close` of the interpreter itself: the one of gevent is in pieces when the interpreter ends."""

register_at_fork: Final[Callable[..., None]] = getattr(os, "register_at_fork", lambda **_: None)
geteuid: Final[Callable[[], int]] = getattr(os, "geteuid", lambda: -1)
getegid: Final[Callable[[], int]] = getattr(os, "getegid", lambda: -1)


def physical_memory() -> float:
    """Return the bytes of memory that the machine has; `math.inf`: unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as exc:
        pass_on_interruption(exc)
        return math.inf


def private_memory(size: int) -> mmap.mmap:
    """
    Return zeroed memory of this process alone. A forked child gets a copy of it.

    Raises:
        OSError: There is not as much memory.
    """
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)
