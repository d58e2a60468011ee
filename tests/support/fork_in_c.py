"""
A fork without Python's hooks, as uWSGI does.

The child has a copy of the interpreter's lock (GIL), with a condition variable for which threads of the parent may have
been waiting. If one of them had been woken and another one had not, the child waits for the former when it releases the
GIL; but it does not have that thread. So a child that was forked beside a thread that waits is ended, and another one
is forked.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading

from processes import wait_for

LIBC = ctypes.PyDLL(None)  # calls its functions without releasing the GIL
_RUNTIME = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
_SIZE = 2**20  # more than its size; the GIL is in it


def fork_in_c() -> int:
    """Fork; return the process id of the child, and 0 in the child."""
    interval, collects = sys.getswitchinterval(), gc.isenabled()
    gc.disable()  # a finalizer could release the GIL
    sys.setswitchinterval(1000)  # threads that wait do not ask for the GIL: this one keeps it
    try:
        while True:
            verdict, judge = os.pipe()
            threads = wait_for(_threads_if_none_waits, "a moment in which no thread waits for the GIL")
            child: int = LIBC.fork()
            if not child:
                _hear(verdict, judge)
                return 0
            good = not _wait(threads)
            if good:
                os.write(judge, b"+")
            os.close(judge)
            os.close(verdict)
            if good:
                return child
            os.waitpid(child, 0)
    finally:
        sys.setswitchinterval(interval)
        if collects:
            gc.enable()


def _hear(verdict: int, judge: int) -> None:
    """Return in a child that can be used; end another one, and one without a parent."""
    LIBC.close(judge)
    buffer = ctypes.create_string_buffer(1)
    while (size := LIBC.read(verdict, buffer, 1)) < 0:
        pass  # a signal
    if not size:
        os._exit(1)
    LIBC.close(verdict)


def _threads_if_none_waits() -> list[str]:
    threads = os.listdir("/proc/self/task")
    # After the first look, no thread is left that asks for the GIL because it began to wait with the usual interval. So
    # this thread has the GIL from the beginning of the second look.
    return [] if _wait(threads) or _wait(threads) else threads


def _wait(threads: list[str]) -> bool:
    """Return whether one of these threads, or one that has begun since, may be waiting for the GIL."""
    number = int(_read("/proc/self/stat").rpartition(b")")[2].split()[17])
    return number != len(threads) or any(may_wait(int(each)) for each in threads)


def may_wait(thread: int) -> bool:
    """Return whether a thread waits for the GIL, or runs and may be about to."""
    if thread == threading.get_native_id():
        return False
    call = _read(f"/proc/self/task/{thread}/syscall").split()  # its number and arguments; nothing if it has ended
    return call[:1] in ([b"running"], [b"-1"]) or (len(call) > 1 and 0 <= int(call[1], 16) - _RUNTIME < _SIZE)


def _read(path: str) -> bytes:
    buffer = ctypes.create_string_buffer(1024)
    fd = LIBC.open(path.encode(), os.O_RDONLY)
    size = LIBC.read(fd, buffer, len(buffer))
    LIBC.close(fd)
    return buffer.raw[: max(size, 0)]
