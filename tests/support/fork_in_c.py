"""
A fork without Python's hooks, as uWSGI does.

The child has a copy of the interpreter's lock (GIL). If threads of the parent waited for it, the child waits until they
have taken it; but they do not exist there. A child that was forked beside such a thread is ended, and another one is
forked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

from processes import wait_for

LIBC = ctypes.PyDLL(None)  # calls its functions without releasing the GIL
_RUNTIME = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
_SIZE = 2**20  # at least; the GIL is in it


def fork_in_c() -> int:
    """Fork; return the process id of the child, and 0 in the child."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # threads that wait do not ask for the GIL: this one has it from one look to the other
    try:
        while True:
            verdict, judge = os.pipe()
            threads = wait_for(_threads_if_none_waits, "a moment in which no thread waits for the GIL")
            child: int = LIBC.fork()
            if not child:
                LIBC.read(verdict, ctypes.create_string_buffer(1), 1)
            good = not child or not waiting(threads)
            if child and good:
                os.write(judge, b"+")
            elif child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            os.close(verdict)
            os.close(judge)
            if good:
                return child
    finally:
        sys.setswitchinterval(interval)


def _threads_if_none_waits() -> list[str]:
    threads = os.listdir("/proc/self/task")
    return [] if waiting(threads) else threads


def waiting(threads: list[str]) -> bool:
    """Return whether one of these threads waits for the GIL, or may be about to."""
    buffer = ctypes.create_string_buffer(256)
    for thread in threads:
        if int(thread) == threading.get_native_id():
            continue
        fd = LIBC.open(f"/proc/self/task/{thread}/syscall".encode(), os.O_RDONLY)  # fails if the thread has ended
        size = LIBC.read(fd, buffer, len(buffer))
        LIBC.close(fd)
        call = buffer.raw[: max(size, 0)].split()  # its number and arguments
        if call == [b"running"] or (call[1:] and 0 <= int(call[1], 16) - _RUNTIME < _SIZE):
            return True
    return False
