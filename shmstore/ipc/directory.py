"""The directory of a store: its location, access checks, files and locks."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shlex
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shmstore import urls
from shmstore.engine.layout import pid_namespace
from shmstore.errors import ConfigError, StoreTimeout, StoreUnavailable
from shmstore.options import Options
from shmstore.system import platform
from shmstore.system.files import is_same_file, open_directory, open_nofollow, try_lock
from shmstore.system.forks import on_fork
from shmstore.system.platform import fcntl, geteuid, pwd
from shmstore.system.signals import pass_on_interruption, suppressing

ARENA = "arena"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_PIDS = 2**22  # the kernel's PID_MAX_LIMIT
DEFAULT = "/dev/shm/shmstore-"  # plus the uid: the directory of a user's stores # noqa: S108


def lacking(*, default: bool) -> str:
    """Return why processes cannot share a store, in the ``default`` directory or another one; empty if they can."""
    if platform.LACKING:
        return platform.LACKING
    parent = os.path.dirname(DEFAULT)
    if not default or os.path.isdir(parent):
        return ""
    return f"there is no {parent}; name another directory, in a tmpfs if possible: directory=PATH"


class _StartLock:
    """
    A descriptor of a store's directory and the lock on it. Both are released with the last reference at the latest,
    because a signal handler may raise between any two bytecodes.
    """

    fd = -1

    def __init__(self, path: str) -> None:
        self.fd = open_directory(path)
        on_fork(self)

    def close(self) -> None:
        if self.fd >= 0:
            # Explicitly: a process forked since then shares the lock, and closing this copy alone would not release it.
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            fd, self.fd = self.fd, -1
            os.close(fd)

    __del__ = close

    def after_fork_in_child(self) -> None:
        # Gunicorn forks workers while another thread may hold the lock. A child that kept the descriptor would keep
        # the lock for its whole life.
        if self.fd >= 0:
            os.close(self.fd)  # no unlock: that would release the parent's lock
            self.fd = -1


def checked(name: str, options: Mapping[str, Any]) -> tuple[Options, urls.Location]:
    """
    Return the options and the location of a shared store.

    Raises:
        ConfigError: The name or an option is invalid.
    """
    found = Options.of(**options)
    if "clock" in options:
        raise ConfigError("clock is for private stores: the processes of a shared store need the same clock")
    directory = found.directory
    return found, urls.parse(name, None if directory is None else os.fspath(directory))


@dataclass(frozen=True, slots=True)
class StoreFiles:
    """
    The files of one store: ``arena``, ``options``, ``lock``, ``socket``, in a directory that only its owner can use.

    Sessions and functions are read from these files. Therefore nothing is read or created in a directory that another
    user owns or can change.
    """

    path: str  # the store's own directory, absolute
    uid: int  # its owner: this process' effective user, or the user that a root process starts the server for
    gid: int
    default: bool  # in the default directory, which is as private as the store's own

    @classmethod
    def of(
        cls,
        target: str,
        directory: str | os.PathLike[str] | None = None,
        *,
        uid: int | None = None,
        gid: int | None = None,
    ) -> StoreFiles:
        """
        Return the files of the store with a name or URL. Nothing is created or checked yet.

        The default directory is that of the current effective user: a preloaded application is imported as root and
        served as another user.

        Raises:
            ConfigError: The name or URL is invalid.
        """
        name, base = urls.parse(target, directory)
        uid = geteuid() if uid is None else uid
        parent = os.path.abspath(base) if base is not None else f"{DEFAULT}{uid}"
        return cls(os.path.join(parent, name), uid, platform.getegid() if gid is None else gid, base is None)

    @property
    def name(self) -> str:
        """The store's name."""
        return os.path.basename(self.path)

    def other_owners(self) -> list[str]:
        """Return the other users that have a store of this name, as far as this user may look: root may."""
        if not self.default:
            return []
        paths = glob.glob(f"{DEFAULT}*/{glob.escape(self.name)}")
        uids = {os.path.dirname(path).removeprefix(DEFAULT) for path in paths} - {str(self.uid)}
        return [user_of(uid) for uid in sorted(map(int, filter(str.isdecimal, uids)))]

    def elsewhere(self, command: str = "...") -> str:
        """
        Return where a missing store may be, as the end of a sentence; "" if unknown.

        Args:
            command: The command that the other user would run.
        """
        if others := self.other_owners():
            how = f"sudo -u {shlex.quote(others[0])} {command}"
            return f"; {', '.join(others)} has one of that name: run this as that user ({how})"
        hidden = [
            path
            for path in sorted(glob.glob(f"{DEFAULT}*"))
            if self.default and path != f"{DEFAULT}{self.uid}" and not os.access(path, os.R_OK)
        ]
        return f"; other users have stores in {', '.join(hidden)}: is it one of these?" if hidden else ""

    @property
    def arena(self) -> str:
        """Path of the shared memory."""
        return os.path.join(self.path, ARENA)

    @property
    def options(self) -> str:
        """Path of the options that a restarted server loads."""
        return os.path.join(self.path, "options")

    @property
    def lock(self) -> str:
        """Path of the file that the server keeps locked while it runs; it contains the server's pid."""
        return os.path.join(self.path, "lock")

    @property
    def address(self) -> str:
        """Path of the server's socket. A server that exits on purpose removes it; a killed one leaves it behind."""
        return os.path.join(self.path, "socket")

    # -- the directory ---------------------------------------------------------------------------------------

    def create(self) -> None:
        """
        Create the missing directories for their owner, and check them.

        Raises:
            StoreUnavailable: A directory cannot be created, or is not safe to use.
        """
        for path in (os.path.dirname(self.path), self.path):
            made = self.default or path == self.path
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o700)
                    made = True
                if made and geteuid() != self.uid:
                    self._hand_over(path)
            except OSError as exc:
                pass_on_interruption(exc)
                raise StoreUnavailable(f"{path} cannot be created: {exc.strerror}{self._advice(exc)}") from exc
        self.check()

    def _advice(self, exc: OSError) -> str:
        """Return advice for the case that a directory cannot be created."""
        if exc.errno in _NO_SPACE:
            return ""
        if self.default:
            return (
                "; if /dev/shm is missing or not writable, name another directory, in a tmpfs if possible: "
                "directory=PATH (in a URL shm:///PATH/NAME)"
            )
        return f"; create {os.path.dirname(self.path)} for {_user(self.uid)}, or name another one: directory=PATH"

    def _hand_over(self, path: str) -> None:
        """As root: give a directory that root has created to the store's owner."""
        fd = open_directory(path)  # not by path: its owner could replace it by a link in the meantime
        try:
            if os.fstat(fd).st_uid == 0:
                os.fchown(fd, self.uid, self.gid)
        finally:
            os.close(fd)

    def check(self) -> None:
        """
        Make sure that no other user can read or change the contents of the store's directory.

        Raises:
            StoreUnavailable: The directory is missing or not safe to use; the message says what to do.
        """
        self._check(os.path.dirname(self.path), private=self.default)
        self._check(self.path, private=True)

    def _check(self, path: str, *, private: bool) -> None:
        try:
            st = os.lstat(path)
        except FileNotFoundError:
            raise StoreUnavailable(
                f"there is no store {self.name!r}: {path} does not exist{self.elsewhere()}"
            ) from None
        except OSError as exc:
            pass_on_interruption(exc)
            raise StoreUnavailable(f"{path} cannot be used: {exc.strerror}") from exc
        mode = stat.S_IMODE(st.st_mode)
        if stat.S_ISLNK(st.st_mode):
            problem = "is a symbolic link; name the directory that it leads to"
        elif not stat.S_ISDIR(st.st_mode):
            problem = "is not a directory; choose another name for the store, or move the file away"
        elif st.st_uid != self.uid and (private or st.st_uid != 0):
            problem = (
                f"belongs to {_user(st.st_uid)}, not to {_user(self.uid)}; "
                "use the store as its owner, or choose another name or directory"
            )
        elif private and mode & 0o077:
            problem = f"has mode {mode:04o}, so other users could read the sessions; chmod 700 {path}"
        elif mode & 0o022 and not mode & stat.S_ISVTX:
            problem = (
                f"has mode {mode:04o}, so other users could replace the store; name a directory in it, to be created: "
                f"directory={os.path.join(path, 'stores')}, or as its owner chmod go-w {path}"
            )
        else:
            return
        raise StoreUnavailable(f"{path} {problem}")

    def remove(self, *, starting: bool = False) -> None:
        """
        Remove the store and the contents of its directory. Only the holder of ``lock`` may call this.

        Args:
            starting: Whether this is a server that is being started, by the process that holds the start lock.
        """
        for path in (self.address, self.arena, self.options):
            for each in (path, f"{path}.new"):  # a server that was killed may have left the second one
                with suppressing(OSError):  # a directory in place of one of these files stays
                    os.unlink(each)
        # A process that is starting a server already relies on the directory, so it stays then.
        lock = contextlib.nullcontext() if starting else self.starting(0, recreate=False)
        with suppressing(StoreUnavailable, OSError), lock:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.lock)
            os.rmdir(self.path)

    # -- locks -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def starting(self, timeout: float, *, recreate: bool = True) -> Iterator[None]:
        """
        Hold the lock under which servers of this store are started or replaced (on the directory itself).

        Args:
            timeout: Seconds to wait for the lock.
            recreate: Whether to create the directory again if it is removed meanwhile.

        Raises:
            StoreTimeout: The lock was not free for ``timeout`` seconds.
            StoreUnavailable: The directory does not exist, or cannot be opened or created.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                lock = _StartLock(self.path)
            except OSError as exc:
                pass_on_interruption(exc)
                if recreate and exc.errno == errno.ENOENT:
                    self.create()
                    continue
                raise StoreUnavailable(f"{self.path} cannot be opened: {exc.strerror}") from exc
            try:
                if not try_lock(lock.fd, deadline - time.monotonic()):
                    raise StoreTimeout(f"another process has been starting store {self.name!r} for {timeout} s")
                # A server without persistence may have removed the directory during the wait.
                if is_same_file(self.path, lock.fd):
                    yield
                    return
            finally:
                lock.close()

    def claim(self, timeout: float) -> int | None:
        """
        Become the only server of this store: return the locked descriptor, or None if another server keeps it.

        Args:
            timeout: Seconds to wait for a server that is exiting.
        """
        deadline = time.monotonic() + timeout
        while True:
            fd = self._open_lock()
            try:
                if try_lock(fd) and is_same_file(self.lock, fd):
                    # The file never shrinks in between: in a full tmpfs another process would take the page at once.
                    os.pwrite(fd, b"%-10d %-10d\n" % (os.getpid(), pid_namespace()), 0)
                    os.ftruncate(fd, 22)
                    return fd
            except BaseException:
                os.close(fd)  # otherwise this process itself would block the next attempt
                raise
            os.close(fd)  # locked by another server, or removed with the store by a server that has just exited
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)

    def _open_lock(self) -> int:
        """Open the lock file for writing. A link is refused, because it would lead to another file."""
        problem = StoreUnavailable(f"{self.lock} is a link, or not a file of the store's owner; remove it")
        try:
            fd = open_nofollow(self.lock, os.O_RDWR | os.O_CREAT)
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.EISDIR, errno.EACCES):
                raise problem from exc
            raise
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or st.st_nlink > 1 or st.st_uid not in (self.uid, geteuid()):
            os.close(fd)
            raise problem
        return fd

    def server(self) -> int | None:
        """
        Return the pid of the server that holds the store, or None if no such process is visible from here.

        The pid of a server in another container means no process here, or a different one, and is not returned.
        Create a `Process` from the pid and ask again: the same answer means that the process is the server.
        """
        try:
            fd = open_nofollow(self.lock)
        except OSError as exc:
            pass_on_interruption(exc)
            return None
        try:
            if try_lock(fd):
                return None
            pid, _, namespace = os.pread(fd, 64, 0).decode("ascii", "replace").partition(" ")
            named = int(pid) if pid.isdecimal() and namespace.strip() == str(pid_namespace()) else 0
            return named if 0 < named < _PIDS else None  # the owner of the store may have written anything
        finally:
            os.close(fd)


def user_of(uid: int) -> str:
    """Return a user's name in the form for ``sudo -u``; ``#1000`` for a uid without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def _user(uid: int) -> str:
    try:
        return f"uid {uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return f"uid {uid}"
