"""The lock and the socket by which a store has one server: held in the store's directory while the server runs."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from shmstore.ipc.directory import StoreFiles
from shmstore.system.files import is_same_file, socket_address


class SingleInstance:
    """
    The exclusive lock of a store's server, and its listening socket. Other processes may remove either file.

    Args:
        files: The files of the store.
        lock: The descriptor of the lock, from `StoreFiles.claim`.

    Attributes:
        listener: The listening socket.

    Raises:
        OSError: The socket cannot be created.
    """

    def __init__(self, files: StoreFiles, lock: int) -> None:
        self._files = files
        self._lock = lock
        self.listen()

    def listen(self) -> None:
        """Create the listener, or recreate it; open connections survive. The caller closes the previous listener."""
        listener = listen(self._files)
        listener.setblocking(False)
        self.listener: socket.socket = listener
        self._socket_file = os.lstat(self._files.address)

    def holds_lock(self) -> bool:
        """Return whether the lock file in the directory is the one that this process has locked."""
        return is_same_file(self._files.lock, self._lock)

    def owns_socket(self) -> bool:
        """Return whether the socket in the directory is the one that this process listens on."""
        return is_same_file(self._files.address, self._socket_file)

    def retake_lock(self) -> bool:
        """Take the lock again if its file was removed; return False if another server has it by now."""
        if not self.holds_lock():
            lock = self._files.claim(0)
            if lock is None:
                return False
            os.close(self._lock)
            self._lock = lock
        return True

    def close(self) -> None:
        """Accept no more connections. The socket in the directory is removed unless it is a successor's."""
        if self.owns_socket():
            os.unlink(self._files.address)
        self.listener.close()


def listen(files: StoreFiles) -> socket.socket:
    """Return a listening socket that replaces an existing one. Only the holder of ``lock`` may call this."""
    temporary = f"{files.address}.new"
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket_address(temporary) as path:
        listener.bind(path)
    listener.listen(128)
    # Renamed when it already listens, so a client finds either the old socket or a working one.
    os.rename(temporary, files.address)
    return listener
