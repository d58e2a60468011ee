"""
Takes from this process what another operating system lacks, then runs Python code there.

``python other_platform.py PLATFORM [-m MODULE | -c CODE] ARGUMENTS...``, with the arguments of Python itself.

What the tests stand on is imported before that: it has its own ways on other systems, and is not what is tested. The
package itself is imported afterwards.
"""

from __future__ import annotations

import asyncio  # noqa: F401
import ctypes
import importlib
import mmap
import os
import runpy
import select
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Final

for _name in (
    "click.testing", "dill", "django.test", "flask", "flask.testing", "multiprocess.managers", "prometheus_client",
    "pytest", "redis", "rich", "trio",
):  # fmt: skip
    importlib.import_module(_name)
sysconfig.get_config_vars()  # it looks for a file by the name of the platform, once

_LINUX_ONLY: Final[dict[ModuleType, str]] = {
    os: "eventfd eventfd_read eventfd_write getresgid getresuid memfd_create pidfd_open posix_fallocate setns unshare",
    time: "CLOCK_BOOTTIME",
    signal: "pidfd_send_signal",
    select: "epoll",
    mmap: "MADV_DONTDUMP MADV_POPULATE_READ MADV_POPULATE_WRITE MAP_POPULATE",
    socket: "SO_PEERCRED",
}
_UNIX_ONLY: Final[dict[ModuleType, str]] = {
    os: "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK WNOHANG confstr confstr_names fchmod fchown fork getegid geteuid "
    "getgid killpg posix_spawn pread pwrite register_at_fork sched_yield statvfs sysconf",
    time: "clock_gettime clock_gettime_ns CLOCK_MONOTONIC",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGUSR1 SIGUSR2 setitimer",
    select: "poll",
    mmap: "MAP_ANON MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED",
    socket: "AF_UNIX",
}
_UNIX_MODULES: Final = ("fcntl", "grp", "pwd", "resource", "syslog", "termios")


def _without(names: dict[ModuleType, str]) -> None:
    for module, listed in names.items():
        for name in listed.split():
            if hasattr(module, name):
                delattr(module, name)


def _without_robust_mutexes() -> None:
    class PyDLL(ctypes.PyDLL):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("pthread_mutex"):
                raise AttributeError(name)
            return super().__getattr__(name)

    ctypes.PyDLL = PyDLL  # type: ignore[misc] # the code under test sees no other


def bare_linux() -> None:
    """As a Python for Linux that was built for an old kernel and another C library."""
    _without(_LINUX_ONLY)
    _without_robust_mutexes()


def macos() -> None:
    _without(_LINUX_ONLY)
    _without_robust_mutexes()
    sys.platform = "darwin"


def windows() -> None:
    """As Windows, but for its name: the standard library here has no Windows side."""
    for name in _UNIX_MODULES:
        sys.modules[name] = None  # type: ignore[assignment] # an import of it is an ImportError then
    macos()
    socket.socketpair = partial(
        socket.socketpair, socket.AF_UNIX
    )  # its default here; asyncio needs a pair of some kind
    _without(_UNIX_ONLY)


PLATFORMS: Final[dict[str, Callable[[], None]]] = {"bare-linux": bare_linux, "macos": macos, "windows": windows}


def main() -> None:
    _, platform, kind, code, *arguments = sys.argv
    assert not any(name.partition(".")[0] == "shmstore" for name in sys.modules), "it is imported on the other platform"
    PLATFORMS[platform]()
    sys.argv = [code, *arguments]
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = "-c"
        exec(code, {"__name__": "__main__"})


if __name__ == "__main__":
    main()
