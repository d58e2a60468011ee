"""Creates a restricted environment for this process alone, then executes a command there.

``python hard_place.py PLACE COMMAND...`` in a mount namespace of its own, as `UNSHARE` makes one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
NEEDED = sorted({str(Path(__file__).resolve().parents[2]), sys.prefix, sys.base_prefix}, key=len)

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR, _PIDFD_SEND_SIGNAL, _PIDFD_OPEN = 442, 424, 434  # on x86-64 and on arm64
_MOUNT_ATTR_RDONLY = 1
_MS_BIND = 4096
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h: BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ, BPF_RET


def tmpfs(place: str, options: str = "mode=1777") -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)


def bind(source: str, target: str) -> None:
    """Not with the mount command, which resolves links and mounts their current target."""
    if _libc.mount(source.encode(), target.encode(), None, _MS_BIND, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def read_only() -> None:
    """As under ProtectSystem=strict, except for /dev/shm."""
    attributes = struct.pack("4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    if _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "mount_setattr")
    tmpfs("/dev/shm")


def full() -> None:
    """No byte is free in a temporary directory, nor in the working directory."""
    for place in ("/var/tmp", "/tmp"):
        kept = {path: os.open(path, os.O_PATH) for path in NEEDED if path.startswith(f"{place}/")}
        tmpfs(place, "size=64k")
        for path, fd in kept.items():
            os.makedirs(path, exist_ok=True)
            bind(f"/proc/self/fd/{fd}", path)
        with contextlib.suppress(OSError), open(f"{place}/hog", "wb", buffering=0) as hog:
            while True:
                hog.write(bytes(4096))
    os.chdir("/tmp")


def without_proc() -> None:
    tmpfs("/proc", "mode=0555")


def without_proc_sys() -> None:
    """As under ProcSubset=pid: /proc has only processes."""
    tmpfs("/proc/sys", "mode=0555")
    for name in ("meminfo", "mounts", "stat", "uptime", "cmdline"):
        with contextlib.suppress(FileNotFoundError), tempfile.NamedTemporaryFile("w", dir="/dev/shm") as empty:
            if not Path("/proc", name).is_symlink():
                bind(empty.name, f"/proc/{name}")


def without_shm() -> None:
    """As in some sandboxes: /dev has only the most important devices."""
    kept = {name: os.open(f"/dev/{name}", os.O_PATH) for name in ("null", "urandom")}
    tmpfs("/dev", "mode=0755")
    for name, fd in kept.items():
        Path("/dev", name).touch()
        bind(f"/proc/self/fd/{fd}", f"/dev/{name}")


def without_shm_or_proc() -> None:
    """As on other operating systems."""
    without_shm()
    without_proc()


def read_only_shm() -> None:
    tmpfs("/dev/shm", "ro,mode=1777")


def refuse(*calls: int, error: int) -> None:
    """Let system calls fail, as in a sandbox."""
    code = [(_LOAD, 0, 0, 0)]  # the number of the call
    for at, number in enumerate(calls):
        code.append((_EQUAL, len(calls) - at, 0, number))
    code += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | error)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program)))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filters):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "prctl")


PLACES: dict[str, Callable[[], None]] = {
    "read-only": read_only,
    "full": full,
    "no-proc": without_proc,
    "no-proc-sys": without_proc_sys,
    "no-shm": without_shm,
    "no-shm-no-proc": without_shm_or_proc,
    "read-only-shm": read_only_shm,
    "no-pidfd-ENOSYS": lambda: refuse(_PIDFD_OPEN, _PIDFD_SEND_SIGNAL, error=errno.ENOSYS),
    "no-pidfd-EPERM": lambda: refuse(_PIDFD_OPEN, _PIDFD_SEND_SIGNAL, error=errno.EPERM),
}

UNPRIVILEGED = frozenset({"no-pidfd-ENOSYS", "no-pidfd-EPERM"})
IMPOSSIBLE = 77


def main() -> None:
    place = sys.argv[1]
    try:
        PLACES[place]()
    except (OSError, subprocess.CalledProcessError) as exc:
        print(exc, file=sys.stderr)
        sys.exit(IMPOSSIBLE)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
